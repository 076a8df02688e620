#!/bin/sh
# Builds a Debian package of a built binary:
#
#   packaging/deb.sh BINARY DIRECTORY
#
# What `make install` puts below /usr, as a package: the units are enabled and started, and an
# upgrade restarts the daemon, which containers do not notice. Records of volumes that were made
# without a home share exist only in /var/lib/nfsvol, so no removal touches that directory.
set -eu

here=$(dirname "$0")
binary=$1
version=$("$binary" --version | cut -d' ' -f2)
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

chmod 0755 "$root"
DESTDIR=$root PREFIX=/usr "$here/install.sh" install "$binary"
gzip -9n "$root"/usr/share/man/man1/*
mkdir -p "$root/usr/share/doc/nfsvol" "$root/DEBIAN"
install -m 0644 "$here/../README.md" "$here"/../docs/*.md "$root/usr/share/doc/nfsvol/"
# Debian keeps the Apache licence in /usr/share/common-licenses.
{
    printf 'nfsvol is under either of these licences, at your choice: Apache-2.0, which is in\n'
    printf '/usr/share/common-licenses/Apache-2.0, or this one:\n\n'
    cat "$here/../LICENSE-MIT"
} >"$root/usr/share/doc/nfsvol/copyright"

# A static binary needs no library; another names the one that it was linked with.
depends=
if needed=$(ldd "$binary" 2>/dev/null) && [ "${needed#*libc.so}" != "$needed" ]; then
    depends="Depends: libc6 (>= $(dpkg-query -W -f '${Version}' libc6 | cut -d- -f1))"
fi
cat >"$root/DEBIAN/control" <<END
Package: nfsvol
Version: $version
Architecture: $arch
Maintainer: The nfsvol developers <nfsvol@localhost>
Section: admin
Priority: optional
Installed-Size: $(du -sk "$root" | cut -f1)
${depends:+$depends
}Suggests: docker.io | docker-ce, nfs-common
Description: Docker volumes that follow a container to any host
 A volume plugin for Docker and Podman. Volumes and their records lie on an NFS
 server; every host sees the same ones.
END
echo /etc/default/nfsvol >"$root/DEBIAN/conffiles"

units="nfsvol.socket nfsvol.service"
script() { # script NAME: standard input becomes that script of the package
    { printf '#!/bin/sh\nset -e\nunits="%s"\n' "$units" && cat; } >"$root/DEBIAN/$1"
    chmod 0755 "$root/DEBIAN/$1"
}
script postinst <<'END'
[ "$1" = configure ] || exit 0
for unit in $units; do
    deb-systemd-helper unmask "$unit" >/dev/null || true
    if deb-systemd-helper --quiet was-enabled "$unit"; then
        deb-systemd-helper enable "$unit" >/dev/null || true
    else
        deb-systemd-helper update-state "$unit" >/dev/null || true
    fi
done
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    if [ -n "$2" ]; then
        deb-systemd-invoke try-restart nfsvol.service || true
    else
        deb-systemd-invoke start nfsvol.socket nfsvol.service || true
    fi
fi
END
script prerm <<'END'
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop nfsvol.service nfsvol.socket || true
fi
END
script postrm <<'END'
[ "$1" != remove ] || deb-systemd-helper mask $units >/dev/null || true
if [ "$1" = purge ]; then
    deb-systemd-helper purge $units >/dev/null || true
    deb-systemd-helper unmask $units >/dev/null || true
    [ ! -d /var/lib/nfsvol ] || echo "kept: /var/lib/nfsvol (see docs/OPERATIONS.md)"
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
END

mkdir -p "$2"
dpkg-deb --root-owner-group --build "$root" "$2/nfsvol_${version}_$arch.deb"
