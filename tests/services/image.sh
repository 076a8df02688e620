# Run in the root directory of a new image ($PWD), with the service's name in $service: its
# programs from Debian's packages, and an entry point that does what the official image's does.

# Copies programs with the libraries that they need.
pack() {
  cp -L --parents "$@" .
  for file; do ldd "$file" 2>/dev/null | grep -o '/[^ ]*' || true; done | sort -u | xargs -r cp -L --parents -t .
}

mkdir -p tmp run usr/share
chmod 1777 tmp
echo 'service:x:999:999::/tmp:/bin/sh' >>etc/passwd
echo 'service:x:999:' >>etc/group
echo 'passwd: files' >etc/nsswitch.conf

# Docker gives an empty volume the owner of what the image has there.
own() {
  mkdir -p "$1"
  chown 999:999 "$1"
}

case $service in
redis)
  own data
  pack /usr/bin/redis-server
  cat >entry <<'END'
#!/bin/sh
exec /usr/bin/"$@" --protected-mode no
END
  ;;
postgres)
  own var/lib/postgresql/data
  home=$(echo /usr/lib/postgresql/*)
  pack "$home"/bin/postgres "$home"/bin/initdb "$home"/lib/plpgsql.so "$home"/lib/dict_snowball.so \
    "$home"/lib/amcheck.so
  cp -rL --parents "/usr/share/postgresql/${home##*/}" /usr/share/zoneinfo .
  cat >entry <<END
#!/bin/sh -e
PATH=$home/bin:\$PATH
if ! [ -s "\$PGDATA/PG_VERSION" ]; then
  initdb -U postgres -E UTF8 --locale=C -A trust >/dev/null
  echo "host all all all \$POSTGRES_HOST_AUTH_METHOD" >>"\$PGDATA/pg_hba.conf"
fi
exec postgres -c listen_addresses='*' -k /tmp
END
  ;;
mariadb)
  own var/lib/mysql
  pack /usr/sbin/mariadbd /usr/bin/my_print_defaults /usr/bin/resolveip
  cp -rL --parents /usr/bin/mariadb-install-db /usr/share/mysql .
  cat >entry <<'END'
#!/bin/sh -e
data=/var/lib/mysql
if ! [ -d $data/mysql ]; then
  mariadb-install-db --no-defaults --basedir=/usr --datadir=$data --skip-test-db \
    --auth-root-authentication-method=normal >/dev/null
fi
exec /usr/sbin/mariadbd --no-defaults --datadir=$data --socket=/tmp/my.sock --skip-grant-tables \
  --skip-name-resolve --bind-address=0.0.0.0
END
  ;;
esac
chmod 755 entry
