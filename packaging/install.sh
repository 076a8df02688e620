#!/bin/sh
# Puts nfsvol below $DESTDIR, or removes it from there:
#
#   packaging/install.sh install BINARY
#   packaging/install.sh uninstall
#
# PREFIX is /usr/local unless set. Units, completions and man pages are where systemd, the shells
# and man look for that prefix. Nothing is started, stopped or enabled.
set -eu

here=$(dirname "$0")
prefix=${PREFIX:-/usr/local}
root=${DESTDIR:-}
bin=$prefix/bin/nfsvol
units=$prefix/lib/systemd/system
bash=$prefix/share/bash-completion/completions/nfsvol
# Debian's zsh looks elsewhere for what packages bring.
case $prefix in
/usr) zsh=/usr/share/zsh/vendor-completions/_nfsvol ;;
*) zsh=$prefix/share/zsh/site-functions/_nfsvol ;;
esac
fish=$prefix/share/fish/vendor_completions.d/nfsvol.fish
man=$prefix/share/man/man1
# The daemon itself does what this unit of earlier versions did.
gone=$units/nfsvol-announce.service
settings=/etc/default/nfsvol

put() { # put FILE MODE: standard input becomes that file, at once and whole
    mkdir -p "$root$(dirname "$1")"
    cat >"$root$1.new"
    chmod "$2" "$root$1.new"
    mv "$root$1.new" "$root$1"
}

case ${1:-} in
install)
    binary=$(realpath "$2")
    rm -f "$root$gone"
    put "$bin" 0755 <"$binary"
    for unit in nfsvol.service nfsvol.socket; do
        sed "s|@BIN@|$bin|" "$here/$unit" | put "$units/$unit" 0644
    done
    # What an administrator wrote stays.
    [ -e "$root$settings" ] || put "$settings" 0644 <"$here/nfsvol.default"
    "$binary" completion bash | put "$bash" 0644
    "$binary" completion zsh | put "$zsh" 0644
    "$binary" completion fish | put "$fish" 0644
    mkdir -p "$root$man"
    "$binary" man "$root$man"
    ;;
uninstall)
    rm -f "$root$bin" "$root$units"/nfsvol.service "$root$units"/nfsvol.socket \
        "$root$gone" "$root$bash" "$root$zsh" "$root$fish" \
        "$root$man"/nfsvol.1 "$root$man"/nfsvol-*.1
    if cmp -s "$here/nfsvol.default" "$root$settings"; then
        rm "$root$settings"
    elif [ -e "$root$settings" ]; then
        echo "kept, because it was changed: $root$settings"
    fi
    ;;
*)
    echo "usage: packaging/install.sh install BINARY | uninstall" >&2
    exit 2
    ;;
esac
