//! What the other hosts hold, as of the last look: by host and by volume.
//!
//! Invariant: it is made once a look and shared since, so that asking it costs what the answer is
//! long, whatever the number of hosts and volumes.

use std::collections::HashMap;
use std::sync::Arc;

use crate::api::volumes::HeldBy;
use crate::cluster::{Hold, HostDoc};
use crate::volume::VolumeName;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    docs: Vec<Arc<HostDoc>>,
    /// Which of `docs` hold a volume.
    holding: HashMap<VolumeName, Vec<usize>>,
}

impl Elsewhere {
    pub(super) fn new(docs: Vec<Arc<HostDoc>>) -> Self {
        let mut holding: HashMap<VolumeName, Vec<usize>> = HashMap::new();
        for (at, doc) in docs.iter().enumerate() {
            for name in doc.holds.keys() {
                holding.entry(name.clone()).or_default().push(at);
            }
        }
        Self { docs, holding }
    }

    /// The hosts, by name.
    pub(super) fn hosts(&self) -> impl Iterator<Item = &str> {
        self.docs.iter().map(|doc| doc.host.as_str())
    }

    /// Who holds a volume, and how.
    pub(super) fn of(&self, name: &VolumeName) -> impl Iterator<Item = (&str, &Hold)> {
        let holding = self.holding.get(name).into_iter().flatten();
        holding.filter_map(|at| {
            let doc = self.docs.get(*at)?;
            Some((doc.host.as_str(), doc.holds.get(name)?))
        })
    }

    /// The same, for people.
    pub(super) fn lines(&self, name: &VolumeName) -> Vec<HeldBy> {
        let line = |(host, hold): (&str, &Hold)| HeldBy {
            host: host.to_owned(),
            since: crate::layout::rfc3339(hold.since),
            holders: hold.holders.clone(),
        };
        self.of(name).map(line).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::volume::Access;

    /// The documents of `hosts` hosts, of which some hold `each` volumes of their own.
    pub(crate) fn documents(hosts: usize, holding: usize, each: usize) -> Vec<HostDoc> {
        let hold = Hold {
            nonce: "0123456789abcdef".to_owned(),
            access: Access::default(),
            since: 1_795_000_000,
            holders: vec!["container 0123456789ab".to_owned()],
        };
        let holds = |host: usize| {
            let volumes = (0..each).filter(move |_| host < holding);
            let name = move |at: usize| format!("volume-{}", host * each + at);
            volumes.map(move |at| name(at).parse().expect("a name"))
        };
        (0..hosts)
            .map(|host| HostDoc {
                format: 1,
                host: format!("host-{host:03}"),
                id: String::new(),
                boot: String::new(),
                session: String::new(),
                session_ms: 30_000,
                holds: holds(host).map(|name| (name, hold.clone())).collect(),
            })
            .collect()
    }

    #[test]
    fn a_volume_is_found_without_a_look_at_each_host() {
        let view = Elsewhere::new(documents(500, 300, 30).into_iter().map(Arc::new).collect());
        assert_eq!(view.hosts().count(), 500);
        assert_eq!(view.holding.len(), 9000);
        assert!(view.holding.values().all(|hosts| hosts.len() == 1));
        let host = |name: &str| {
            let name = name.parse().unwrap();
            view.of(&name)
                .map(|(host, _)| host.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(host("volume-8999"), ["host-299"]);
        assert_eq!(host("volume-9000"), [""; 0]);
    }
}
