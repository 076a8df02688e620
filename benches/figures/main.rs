//! The figures that nfsvol promises, measured on real parts beside their peers: `make bench`.
//!
//! Each trial starts what it needs in a lab of its own (crates/lab), takes medians of several
//! rounds in which the peers have their turns too, and notes figures ([`report`]). What touches a
//! file system or a socket runs as a process on the lab's node ([`load`]), so no time of the lab
//! is in a figure. A figure that misses its target fails nothing: it is shown as missed.
//!
//! | module | figures |
//! |---|---|
//! | `socket` | round trips on the socket, a catalog of 10,000 volumes |
//! | `kernel` | volumes by an engine's API, throughput through the kernel's NFS client |
//! | `cluster` | moves between hosts, what a host at rest costs its home share |
//! | `operation` | a managed plugin that is enabled, `nfsvol doctor` |
//! | `scale` | a home share of 10,000 volumes and 500 hosts |
//! | `before` | the FUSE data path beside that of an earlier commit |
//! | `walk` | a walk over 1,000,000 files |
//! | `fuse` | the FUSE data path beside sshfs, nfs-cp and the export directory itself |

mod before;
mod cluster;
mod docker;
mod fuse;
mod kernel;
mod load;
mod operation;
mod report;
mod scale;
mod socket;
mod walk;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let role = args.first().map_or("", String::as_str);
    if role == load::ROLE {
        return load::main(&args[1..]);
    }
    let outside = !role.starts_with("lab-");
    if outside {
        let whole = args
            .iter()
            .all(|arg| arg.starts_with('-') && arg != "--list");
        if let Err(error) = report::begin(whole) {
            eprintln!("cannot write the summary: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    let code = lab::main!(|| {
        let mut trials = socket::trials();
        trials.extend(kernel::trials());
        trials.extend(fuse::trials());
        trials.extend(before::trials());
        trials.extend(walk::trials());
        trials.extend(cluster::trials());
        trials.extend(scale::trials());
        trials.extend(operation::trials());
        trials
    });
    if outside && let Err(error) = report::show() {
        eprintln!("cannot read the summary: {error:#}");
        return ExitCode::FAILURE;
    }
    code
}
