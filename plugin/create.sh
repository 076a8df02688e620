#!/bin/sh
# Makes a managed plugin of a static binary, on the local engine; no registry is asked.
#
#   plugin/create.sh BINARY [NAME]          (or: make plugin)
#
# Its root file system is the binary and the directories that something is mounted on. A plugin
# with that name is replaced, with its settings kept (docker plugin upgrade needs a registry): it
# has to be disabled first. DOCKER is the client, `docker` unless set.
set -eu

here=$(realpath "$(dirname "$0")/..")
binary=$1
name=${2:-nfsvol}
docker=${DOCKER:-docker}

if ldd "$binary" 2>/dev/null | grep -q / && [ -z "${LIBRARIES:-}" ]; then
    echo "$binary is not a static binary: make plugin builds one" >&2
    exit 1
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir/rootfs/mnt/host" "$dir/rootfs/mnt/nfsvol" "$dir/rootfs/run/docker/plugins" \
    "$dir/rootfs/etc" "$dir/rootfs/tmp"
install -m 0755 "$binary" "$dir/rootfs/nfsvol"
# LIBRARIES=1, as tests do: a dynamic binary, with what it is linked with.
for library in ${LIBRARIES:+$(ldd "$binary" | grep -o '/[^ ]*')}; do
    install -D "$library" "$dir/rootfs$library"
done
cp "$here/config.json" "$dir/config.json"

settings=
if enabled=$($docker plugin inspect -f '{{.Enabled}}' "$name" 2>/dev/null); then
    if [ "$enabled" = true ]; then
        echo "$name is enabled: docker plugin disable $name (see docs/OPERATIONS.md)" >&2
        exit 1
    fi
    settings=$($docker plugin inspect -f '{{range .Settings.Env}}{{println .}}{{end}}' "$name")
    $docker plugin rm -f "$name" >/dev/null
fi
$docker plugin create "$name" "$dir"
printf '%s\n' "$settings" | while read -r setting; do
    case $setting in
    # Not for the user to set.
    '' | NFSVOL_STATE_DIR=* | NFSVOL_MOUNT_ROOT=*) ;;
    *) $docker plugin set "$name" "$setting" ;;
    esac
done
