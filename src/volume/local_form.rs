//! The options of Docker's `local` driver for NFS: `type=nfs o=addr=…,rw device=:/export/dir`.
//!
//! They mean what they mean there (moby: `volume/local/local_unix.go`): the device is mounted as
//! it is, nothing is made below it, so a Compose file moves by changing its `driver:` line.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::mount_options::split;
use super::options::{OptionError, VolumeOptions, bad};
use nfs::address::{Server, Share};

const KEYS: [&str; 3] = ["type", "o", "device"];
/// Options of ours that say the same thing another way.
const OURS: [&str; 3] = ["share", "subdir", "options"];

/// Whether any option of the `local` driver's form is given.
pub(super) fn is_used(given: &BTreeMap<String, String>) -> bool {
    KEYS.iter().any(|key| given.contains_key(*key))
}

/// Fills share, data directory and mount options from `type`, `o` and `device`.
pub(super) fn apply(
    given: &BTreeMap<String, String>,
    options: &mut VolumeOptions,
) -> Result<(), OptionError> {
    if let Some(ours) = OURS.into_iter().find(|key| given.contains_key(*key)) {
        let reason = "use either share/subdir/options or the local driver's type/o/device";
        return Err(OptionError::Conflict("type/o/device", ours, reason));
    }
    let get = |key: &str| given.get(key).map(String::as_str);
    let kind = get("type").ok_or(OptionError::Missing("type", "type=nfs or type=nfs4"))?;
    if !matches!(kind, "nfs" | "nfs4") {
        return Err(bad(
            "type",
            kind,
            "expected nfs or nfs4 (nfsvol mounts nothing else)",
        ));
    }
    let words: Vec<&str> = split(get("o").unwrap_or_default()).map(str::trim).collect();
    if let Some(bare) = words.iter().find(|word| is_address(word)) {
        let reason = format!("the server is named as addr={bare}");
        return Err(bad("o", bare, reason));
    }
    let device = get("device").ok_or(OptionError::Missing(
        "device",
        "the exported directory, as device=:/export",
    ))?;
    let (host, export) = split_device(device)
        .ok_or_else(|| bad("device", device, "expected :/export or SERVER:/export"))?;

    // Docker takes the first addr= and ignores the rest.
    let addr = words.iter().find_map(|word| word.strip_prefix("addr="));
    let server = addr
        .or_else(|| Some(host).filter(|h| !h.is_empty()))
        .ok_or(OptionError::Missing(
            "o",
            "the server, as o=addr=SERVER, or device=SERVER:/export",
        ))?;
    let server = if server.contains(':') && !server.starts_with('[') {
        format!("[{server}]")
    } else {
        server.to_owned()
    };
    let share: Share = format!("{server}:{export}")
        .parse()
        .map_err(|e| bad("device", device, format!("with server {server}: {e}")))?;
    let mut rest: Vec<&str> = words
        .iter()
        .copied()
        .filter(|w| !w.is_empty() && !w.starts_with("addr=") && !names_again(w, &share))
        .collect();
    // What mount(2) does: without a version, the type decides.
    if !rest.iter().any(|word| is_version(word)) {
        rest.push(match kind {
            "nfs4" => "nfsvers=4",
            _ => "nfsvers=3",
        });
        options.version_by_type = (kind == "nfs").into();
    }
    options.share = Some(share);
    options.subdir = Some(String::new());
    let text = rest.join(",");
    options.mount = Some(text.parse().map_err(|e| bad("o", &text, format!("{e}")))?);
    Ok(())
}

fn is_version(word: &str) -> bool {
    matches!(word, "v3" | "v4" | "v4.0" | "v4.1" | "v4.2")
        || ["vers=", "nfsvers=", "minorversion="]
            .iter()
            .any(|name| word.starts_with(name))
}

/// Whether a word of `o` can only be a server: mount options have no dots in their names.
fn is_address(word: &str) -> bool {
    !word.contains('=')
        && !word.starts_with("x-")
        && (word.parse::<IpAddr>().is_ok() || word.contains('.') && !is_version(word))
}

/// Whether a word names the share's server once more, as a line of /proc/mounts does.
pub(super) fn names_again(word: &str, share: &Share) -> bool {
    let named = ["addr=", "mountaddr=", "mounthost="]
        .iter()
        .find_map(|name| word.strip_prefix(name));
    named.is_some_and(|named| match share.server() {
        Server::Ip(ip) => named.parse() == Ok(*ip),
        server => *named == server.to_string(),
    })
}

fn split_device(device: &str) -> Option<(&str, &str)> {
    let at = device.find(":/")?;
    Some((&device[..at], &device[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeOptions, OptionError> {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        VolumeOptions::parse(&map)
    }

    fn of(kind: &str, o: &str, device: &str) -> VolumeOptions {
        parse(&[("type", kind), ("o", o), ("device", device)]).unwrap()
    }

    #[test]
    fn a_compose_file_for_the_local_driver_means_the_same() {
        let options = of("nfs", "addr=10.0.0.5,rw,nfsvers=4", ":/export/db");
        assert_eq!(
            options.share.as_ref().unwrap().to_string(),
            "10.0.0.5:/export/db"
        );
        assert!(options.data_dir(&"x".parse().unwrap()).unwrap().is_root());
        assert_eq!(options.mount, Some("rw,nfsvers=4".parse().unwrap()));
    }

    #[test]
    fn the_first_addr_wins_over_the_device_as_in_docker() {
        let options = of("nfs", "addr=1.2.3.4,addr=5.6.7.8", "other:/e");
        assert_eq!(options.share.unwrap().to_string(), "1.2.3.4:/e");
        assert_eq!(
            of("nfs", "addr=fd00::5", ":/e").share.unwrap().to_string(),
            "[fd00::5]:/e"
        );
        assert_eq!(
            of("nfs", "rw", "nas:/e").share.unwrap().to_string(),
            "nas:/e"
        );
    }

    #[test]
    fn nfs_is_version_3_unless_one_is_given() {
        let plain = of("nfs", "addr=10.0.0.5,nolock,soft,rw", ":/export/app");
        assert_eq!(
            plain.mount,
            Some("nolock,soft,rw,nfsvers=3".parse().unwrap())
        );
        assert_eq!(
            of("nfs", "addr=nas", ":/e").mount,
            Some("nfsvers=3".parse().unwrap())
        );
        for (o, version) in [
            ("vers=4.2", "4.2"),
            ("v4.1", "4.1"),
            ("nfsvers=4", "4"),
            ("vers=4,minorversion=1", "4.1"),
        ] {
            for kind in ["nfs", "nfs4"] {
                let given = of(kind, &format!("addr=nas,{o}"), ":/e").mount.unwrap();
                assert_eq!(given.nfsvers(), Some(version), "{kind} {o}");
            }
        }
    }

    #[test]
    fn a_volume_that_was_made_before_keeps_its_versions() {
        for (o, mount) in [("addr=nas,rw,soft", Some("rw,soft")), ("addr=nas", None)] {
            let earlier = VolumeOptions {
                mount: mount.map(|mount| mount.parse().unwrap()),
                ..of("nfs", o, ":/e")
            };
            assert_eq!(earlier.differences(&of("nfs", o, ":/e")), [""; 0]);
            // Whoever names the version means it.
            let named = of("nfs", &format!("{o},vers=3"), ":/e");
            assert_eq!(earlier.differences(&named).len(), 1);
            assert_eq!(
                earlier
                    .differences(&of("nfs", &format!("{o},sync"), ":/e"))
                    .len(),
                1
            );
        }
        let four = of("nfs", "addr=nas,vers=4.2", ":/e");
        assert_eq!(four.differences(&of("nfs", "addr=nas", ":/e")).len(), 1);
    }

    #[test]
    fn a_line_of_proc_mounts_names_its_server_twice() {
        let line = "addr=10.0.0.5,rw,relatime,vers=3,namlen=255,hard,nolock,proto=tcp,timeo=600,\
            sec=sys,mountaddr=10.0.0.5,mountvers=3,mountport=20048,mountproto=udp,local_lock=all";
        let options = of("nfs", line, ":/export");
        assert!(!options.mount.unwrap().to_string().contains("mountaddr"));
        let other = [
            ("type", "nfs"),
            ("o", "addr=nas,mountaddr=10.0.0.6"),
            ("device", ":/e"),
        ];
        let refused = parse(&other).unwrap_err().to_string();
        assert!(
            refused.contains("mount option mountaddr is refused"),
            "{refused}"
        );
        let six = of("nfs", "addr=fd00::5,mountaddr=fd00:0::5", ":/e");
        assert!(six.mount.is_some());
        let ours = parse(&[
            ("share", "nas:/e"),
            ("options", "addr=nas,mountaddr=nas,ro"),
        ])
        .unwrap();
        assert_eq!(ours.mount, Some("ro".parse().unwrap()));
        assert!(parse(&[("share", "nas:/e"), ("options", "addr=other")]).is_err());
    }

    #[test]
    fn a_label_with_a_comma_is_one_word() {
        let o = "addr=nas,context=\"u:r:t:s0:c1,c2\",ro";
        let mount = of("nfs4", o, ":/e").mount.unwrap();
        assert!(mount.is_readonly() && mount.to_string().contains("\"u:r:t:s0:c1,c2\""));
    }

    #[test]
    fn a_server_without_addr_is_told() {
        for o in ["10.0.0.5,rw", "rw,fd00::5", "nas.example.net"] {
            for device in ["/export/images", ":/export/images"] {
                let given = [("type", "nfs"), ("o", o), ("device", device)];
                let said = parse(&given).unwrap_err().to_string();
                assert!(said.contains("the server is named as addr="), "{said}");
            }
        }
        let bare = [("type", "nfs"), ("o", "nas,rw"), ("device", ":/e")];
        assert!(
            parse(&bare)
                .unwrap_err()
                .to_string()
                .contains("o=addr=SERVER")
        );
    }

    #[test]
    fn nfs4_asks_for_version_4_unless_one_is_given() {
        let plain = of("nfs4", "addr=nas", ":/e");
        assert_eq!(plain.mount, Some("nfsvers=4".parse().unwrap()));
        let given = of("nfs4", "addr=nas,vers=4.1", ":/e");
        assert_eq!(given.mount, Some("vers=4.1".parse().unwrap()));
    }

    #[test]
    fn what_is_missing_or_foreign_is_named() {
        let refusal = |pairs: &[(&str, &str)]| parse(pairs).unwrap_err().to_string();
        assert!(refusal(&[("type", "tmpfs"), ("device", "tmpfs")]).contains("option type="));
        assert!(
            refusal(&[("type", "nfs"), ("o", "addr=nas")]).contains("option device is missing")
        );
        assert!(refusal(&[("type", "nfs"), ("device", ":/e")]).contains("o=addr=SERVER"));
        assert!(refusal(&[("device", ":/e")]).contains("option type is missing"));
        let both = refusal(&[("type", "nfs"), ("device", "n:/e"), ("share", "n:/e")]);
        assert!(both.contains("exclude each other"));
    }
}
