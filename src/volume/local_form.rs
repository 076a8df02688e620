//! The options of Docker's `local` driver for NFS: `type=nfs o=addr=…,rw device=:/export/dir`.
//!
//! They mean what they mean there (moby: `volume/local/local_unix.go`): the device is mounted as
//! it is, nothing is made below it, so a Compose file moves by changing its `driver:` line.

use std::collections::BTreeMap;

use super::options::{OptionError, VolumeOptions, bad};
use nfs::address::Share;

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
    let device = get("device").ok_or(OptionError::Missing(
        "device",
        "the exported directory, as device=:/export",
    ))?;
    let (host, export) = split_device(device)
        .ok_or_else(|| bad("device", device, "expected :/export or SERVER:/export"))?;

    let words: Vec<&str> = get("o")
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .collect();
    // Docker takes the first addr= and ignores the rest.
    let addr = words.iter().find_map(|word| word.strip_prefix("addr="));
    let mut rest: Vec<&str> = words
        .iter()
        .copied()
        .filter(|w| !w.is_empty() && !w.starts_with("addr="))
        .collect();
    let version = |word: &&str| {
        word.starts_with("vers=")
            || word.starts_with("nfsvers=")
            || word.starts_with("minorversion=")
    };
    if kind == "nfs4" && !rest.iter().any(version) {
        rest.push("nfsvers=4");
    }
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
    options.share = Some(share);
    options.subdir = Some(String::new());
    options.mount = if rest.is_empty() {
        None
    } else {
        let text = rest.join(",");
        Some(text.parse().map_err(|e| bad("o", &text, format!("{e}")))?)
    };
    Ok(())
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
