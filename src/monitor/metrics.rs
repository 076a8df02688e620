//! A view as metrics, in the OpenMetrics text format.
//!
//! Names follow Prometheus' rules: base units, `_total` for counters. Every family is described
//! also while it has no values, so that what a daemon could tell is known from any scrape.
//! docs/OPERATIONS.md has the list ("Metrics"); a test compares.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use super::view::{Mount, Share, View, Worker};
use crate::docker::Calls;

/// Label names and values of one series.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// The text of a scrape.
#[must_use]
pub(crate) fn text(view: View, calls: &Calls) -> String {
    let mut registry = Registry::default();
    let calls = calls.clone();
    registry.register_collector(Box::new(Exposition { view, calls }));
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = text::encode(&mut out, &registry);
    out
}

/// A family with one value for each of something: its kind, name and help, and the value.
type Row<T> = (MetricType, &'static str, &'static str, fn(&T) -> f64);

/// For each volume that a FUSE worker serves.
const OF_WORKERS: [Row<Worker>; 9] = [
    (
        MetricType::Counter,
        "nfsvol_volume_read_bytes",
        "Bytes that the kernel read from the volume's FUSE worker.",
        |worker| number(worker.read_bytes),
    ),
    (
        MetricType::Counter,
        "nfsvol_volume_written_bytes",
        "Bytes that the kernel wrote to the volume's FUSE worker.",
        |worker| number(worker.written_bytes),
    ),
    (
        MetricType::Counter,
        "nfsvol_volume_rpcs",
        "NFSv3 calls of the volume's FUSE worker.",
        |worker| number(worker.rpcs),
    ),
    (
        MetricType::Counter,
        "nfsvol_volume_retransmits",
        "NFSv3 calls that the volume's FUSE worker sent again.",
        |worker| number(worker.retransmits),
    ),
    (
        MetricType::Counter,
        "nfsvol_volume_requests_interrupted",
        "Requests that were ended because their process was killed.",
        |worker| number(worker.interrupted),
    ),
    (
        MetricType::Gauge,
        "nfsvol_volume_requests_running",
        "Requests of the kernel that have no answer yet.",
        |worker| number(worker.running),
    ),
    (
        MetricType::Gauge,
        "nfsvol_volume_unsaved_bytes",
        "Written bytes that the server does not hold durably yet.",
        |worker| number(worker.unsaved),
    ),
    (
        MetricType::Gauge,
        "nfsvol_volume_open_files",
        "Open files of the volume.",
        |worker| number(worker.open_files),
    ),
    (
        MetricType::Gauge,
        "nfsvol_volume_worker_resident_memory_bytes",
        "Memory of the volume's FUSE worker.",
        |worker| number(worker.resident),
    ),
];

/// For each mount of the kernel's NFS client.
const OF_MOUNTS: [Row<Mount>; 7] = [
    (
        MetricType::Gauge,
        "nfsvol_mount_volumes",
        "Attached volumes that share one mount of the kernel's NFS client.",
        |mount| number(mount.volumes),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_read_bytes",
        "Bytes that the kernel's NFS client read from the server.",
        |mount| number(mount.read_bytes),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_written_bytes",
        "Bytes that the kernel's NFS client wrote to the server.",
        |mount| number(mount.written_bytes),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_rpcs",
        "Calls of the kernel's NFS client.",
        |mount| number(mount.rpcs()),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_retransmits",
        "Calls that the kernel's NFS client sent again.",
        |mount| number(mount.retransmits),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_timeouts",
        "Calls of the kernel's NFS client that met a major timeout.",
        |mount| number(mount.timeouts),
    ),
    (
        MetricType::Counter,
        "nfsvol_mount_rtt_seconds",
        "Round trips of the kernel's NFS client, added up.",
        |mount| mount.rtt,
    ),
];

#[derive(Debug)]
struct Exposition {
    view: View,
    calls: Calls,
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(&mut encoder);
        self.daemon(&mut out)?;
        self.shares(&mut out)?;
        self.volumes(&mut out)?;
        self.mounts(&mut out)?;
        self.cluster(&mut out)
    }
}

/// Writes families.
struct Out<'e, 'w>(&'e mut DescriptorEncoder<'w>);

impl Out<'_, '_> {
    fn gauge<'a>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in series {
            match labels.as_slice() {
                [] => metric.encode_gauge(&value)?,
                _ => metric.encode_family(&labels)?.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    fn counter<'a>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in series {
            let none = None::<&Exemplar<NoLabelSet, f64>>;
            match labels.as_slice() {
                [] => metric.encode_counter(&value, none)?,
                _ => metric
                    .encode_family(&labels)?
                    .encode_counter(&value, none)?,
            }
        }
        Ok(())
    }

    /// Families of whatever has these labels.
    fn table<T>(&mut self, table: &[Row<T>], of: &[(Labels<'_>, &T)]) -> fmt::Result {
        for (kind, name, help, value) in table {
            let series = of.iter().map(|(labels, of)| (labels.clone(), value(of)));
            match kind {
                MetricType::Counter => self.counter(name, help, series)?,
                _ => self.gauge(name, help, series)?,
            }
        }
        Ok(())
    }

    /// One value without labels, where it is known.
    fn one(&mut self, name: &str, help: &str, value: Option<f64>) -> fmt::Result {
        self.gauge(name, help, value.map(|value| (Vec::new(), value)))
    }

    fn metric(&mut self, name: &str, help: &str, metric: &impl EncodeMetric) -> fmt::Result {
        let out = self
            .0
            .encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(out)
    }
}

/// Exact up to 2^53, far beyond what a counter here reaches.
#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus has no other numbers than these"
)]
fn number(value: impl TryInto<u64>) -> f64 {
    value.try_into().unwrap_or(u64::MAX) as f64
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

impl Exposition {
    fn daemon(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let (view, calls) = (&self.view, &self.calls);
        let version = vec![("version", view.version)];
        out.gauge("nfsvol_build_info", "The program.", [(version, 1.0)])?;
        let process = &view.process;
        out.one(
            "process_start_time_seconds",
            "When the daemon started, in seconds since 1970.",
            Some(process.started),
        )?;
        out.counter(
            "process_cpu_seconds",
            "Processor time of the daemon.",
            [(Vec::new(), process.cpu)],
        )?;
        out.one(
            "process_resident_memory_bytes",
            "Memory of the daemon.",
            Some(number(process.resident)),
        )?;
        out.one(
            "process_open_fds",
            "Open files of the daemon.",
            Some(number(process.open_files)),
        )?;
        out.metric(
            "nfsvol_calls",
            "Calls of Docker, Podman and the command line, by name and outcome.",
            &calls.total,
        )?;
        out.metric(
            "nfsvol_call_duration_seconds",
            "How long calls took, by name.",
            &calls.seconds,
        )?;
        out.metric(
            "nfsvol_calls_running",
            "Calls that have no answer yet.",
            &calls.running,
        )?;
        out.one(
            "nfsvol_volumes",
            "Volumes that this host knows.",
            Some(number(view.volumes)),
        )?;
        out.one(
            "nfsvol_attachments",
            "Mounts that Docker holds on this host.",
            Some(number(view.attachments)),
        )?;
        out.one(
            "nfsvol_volumes_left_out",
            "Attached volumes without metrics of their own, beyond the first 1,000.",
            Some(number(view.left_out)),
        )
    }

    fn shares(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        // Others are not looked at, so what was last known of them says nothing.
        let used = || self.view.shares.iter().filter(|share| share.in_use);
        out.gauge(
            "nfsvol_share_up",
            "Whether the share answered when it was last looked at.",
            used().filter_map(|share| {
                let home = if share.home { "true" } else { "false" };
                let labels = vec![("share", share.share.as_str()), ("home", home)];
                Some((labels, flag(share.up?)))
            }),
        )?;
        let each = |value: fn(&Share) -> Option<f64>| {
            used().filter_map(move |share| {
                Some((vec![("share", share.share.as_str())], value(share)?))
            })
        };
        out.gauge(
            "nfsvol_share_rtt_seconds",
            "The share's last answer to a look at it, from call to reply.",
            each(|share| share.rtt),
        )?;
        out.gauge(
            "nfsvol_share_last_answer_timestamp_seconds",
            "When the share last answered a look at it, in seconds since 1970.",
            each(|share| share.last_answer.map(number)),
        )?;
        out.gauge(
            "nfsvol_share_size_bytes",
            "Size of the share's file system.",
            each(|share| share.size.map(number)),
        )?;
        out.gauge(
            "nfsvol_share_available_bytes",
            "What can still be written to the share's file system.",
            each(|share| share.available.map(number)),
        )?;
        out.counter(
            "nfsvol_share_rpcs",
            "NFSv3 calls of the daemon itself, for the catalog and sessions.",
            each(|share| Some(number(share.rpcs))),
        )
    }

    fn volumes(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let attached = &self.view.attached;
        out.gauge(
            "nfsvol_volume_attachments",
            "Mounts of a volume that Docker holds on this host.",
            attached.iter().map(|volume| {
                let labels = vec![
                    ("volume", volume.volume.as_str()),
                    ("share", volume.share.as_str()),
                    ("data_path", volume.data_path.as_str()),
                    ("device", volume.device.as_deref().unwrap_or_default()),
                ];
                (labels, number(volume.attachments))
            }),
        )?;
        let workers = self.view.workers;
        let states = [
            ("serving", workers.serving),
            ("leaving", workers.leaving),
            ("silent", workers.silent),
            ("died", workers.died),
        ];
        out.gauge(
            "nfsvol_workers",
            "FUSE workers of attached volumes, by state.",
            states.map(|(state, count)| (vec![("state", state)], number(count))),
        )?;
        out.gauge(
            "nfsvol_volume_worker_up",
            "Whether the volume's FUSE worker lives and answers.",
            attached.iter().filter_map(|volume| {
                let up = volume.worker_state? == "serving";
                Some((vec![("volume", volume.volume.as_str())], flag(up)))
            }),
        )?;
        let served = attached.iter().filter_map(|volume| {
            let labels = vec![("volume", volume.volume.as_str())];
            Some((labels, volume.worker.as_ref()?))
        });
        let served: Vec<(Labels<'_>, &Worker)> = served.collect();
        out.table(&OF_WORKERS, &served)?;
        out.counter(
            "nfsvol_volume_operations",
            "Requests of the kernel to the volume's FUSE worker.",
            served.iter().flat_map(|(labels, worker)| {
                operations(labels, [worker.reads, worker.writes, worker.others])
            }),
        )
    }

    fn mounts(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let mounts = self.view.mounts.iter().map(|mount| {
            let labels = vec![
                ("share", mount.share.as_str()),
                ("device", mount.device.as_str()),
            ];
            (labels, mount)
        });
        let mounts: Vec<(Labels<'_>, &Mount)> = mounts.collect();
        out.table(&OF_MOUNTS, &mounts)?;
        out.counter(
            "nfsvol_mount_operations",
            "Operations of the kernel's NFS client.",
            mounts.iter().flat_map(|(labels, mount)| {
                operations(labels, [mount.reads, mount.writes, mount.others])
            }),
        )
    }

    fn cluster(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let cluster = self.view.cluster.as_ref();
        out.one(
            "nfsvol_hosts",
            "Hosts of the cluster that live, this one among them.",
            cluster.map(|cluster| number(cluster.hosts.len())),
        )?;
        out.one(
            "nfsvol_session_valid",
            "Whether this host's session on the home share is good.",
            cluster.map(|cluster| flag(cluster.session)),
        )?;
        out.one(
            "nfsvol_session_right_seconds",
            "For how much longer exclusive volumes may be used without a renewal.",
            cluster.map(|cluster| cluster.right),
        )?;
        out.one(
            "nfsvol_holds",
            "Volumes that this host holds, as the other hosts see it.",
            cluster.map(|cluster| number(cluster.holds)),
        )?;
        out.one(
            "nfsvol_claims",
            "Exclusive volumes that this host has.",
            cluster.map(|cluster| number(cluster.claims)),
        )?;
        let trash = self.view.trash.as_ref();
        out.one(
            "nfsvol_trash_entries",
            "Removed volumes in the trash of the home share.",
            trash.map(|trash| number(trash.entries)),
        )?;
        out.one(
            "nfsvol_trash_oldest_timestamp_seconds",
            "When the oldest of them was removed, in seconds since 1970 by the server's clock.",
            trash.and_then(|trash| trash.oldest).map(number),
        )
    }
}

fn operations<'a>(labels: &Labels<'a>, counts: [u64; 3]) -> Vec<(Labels<'a>, f64)> {
    let names = ["read", "write", "other"].into_iter();
    let of = |(name, count)| {
        let mut labels = labels.clone();
        labels.push(("operation", name));
        (labels, number(count))
    };
    names.zip(counts).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::view::{Attached, Cluster, Trash, Workers};

    fn view() -> View {
        View {
            version: "1.2.3",
            volumes: 7,
            shares: vec![
                Share {
                    share: "nas:/a\"b\n".to_owned(),
                    in_use: true,
                    up: Some(false),
                    rtt: Some(0.25),
                    ..Share::default()
                },
                Share {
                    share: "gone:/x".to_owned(),
                    up: Some(false),
                    ..Share::default()
                },
            ],
            attached: vec![Attached {
                volume: "db".to_owned(),
                worker: Some(Worker {
                    reads: 3,
                    read_bytes: 4096,
                    ..Worker::default()
                }),
                worker_state: Some("serving"),
                ..Attached::default()
            }],
            workers: Workers {
                serving: 1,
                ..Workers::default()
            },
            mounts: vec![Mount {
                share: "nas:/export".to_owned(),
                device: "0:53".to_owned(),
                reads: 1,
                writes: 2,
                others: 3,
                rtt: 0.5,
                ..Mount::default()
            }],
            cluster: Some(Cluster::default()),
            trash: Some(Trash::default()),
            ..View::default()
        }
    }

    #[test]
    fn a_view_is_told_in_prometheus_words() {
        let calls = Calls::default();
        let took = std::time::Duration::from_millis(3);
        calls.begin("Mount").end("ok", took);
        calls.begin("Get").end("client gone", took);
        calls.refused(None);
        let text = text(view(), &calls);
        for line in [
            "nfsvol_build_info{version=\"1.2.3\"} 1.0",
            "nfsvol_volumes 7.0",
            "nfsvol_calls_total{call=\"Mount\",outcome=\"ok\"} 1",
            "nfsvol_calls_total{call=\"Get\",outcome=\"client_gone\"} 1",
            "nfsvol_calls_total{call=\"unknown\",outcome=\"refused\"} 1",
            "nfsvol_call_duration_seconds_bucket{le=\"0.0025\",call=\"Mount\"} 0",
            "nfsvol_call_duration_seconds_bucket{le=\"0.005\",call=\"Mount\"} 1",
            "nfsvol_calls_running 0",
            "nfsvol_share_up{share=\"nas:/a\\\"b\\n\",home=\"false\"} 0.0",
            "nfsvol_volume_read_bytes_total{volume=\"db\"} 4096.0",
            "nfsvol_volume_operations_total{volume=\"db\",operation=\"read\"} 3.0",
            "nfsvol_workers{state=\"serving\"} 1.0",
            "nfsvol_mount_rpcs_total{share=\"nas:/export\",device=\"0:53\"} 6.0",
            "nfsvol_mount_rtt_seconds_total{share=\"nas:/export\",device=\"0:53\"} 0.5",
            "nfsvol_session_valid 0.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("gone:/x"), "not in use:\n{text}");
    }

    #[test]
    fn every_family_is_described_without_values_too() {
        let names = |text: &str| {
            let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
            types.map(str::to_owned).collect::<Vec<_>>()
        };
        let bare = text(View::default(), &Calls::default());
        assert_eq!(names(&bare), names(&text(view(), &Calls::default())));
        assert!(names(&bare).len() > 35);
    }
}
