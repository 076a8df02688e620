//! `nfsvol embedded-server`: the embedded NFS server in its own process.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::local_server::{self, Options};

/// Flags of `nfsvol embedded-server`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nfsvol serve --share embedded:/srv/volumes     starts it by itself
  nfsvol embedded-server --listen 10.0.0.5:2049 --listen 10.0.0.5:111 /srv/volumes
                                                 for other hosts of a test network
It is not a production server: one directory of one host, AUTH_UNIX believed, root stays root, no
locks between hosts. It ends by SIGTERM.")]
pub(super) struct LocalServerArgs {
    /// Directory to serve
    dir: PathBuf,
    /// Where to listen; may be repeated: the port mapper, answered on each, tells the first port
    /// [default: 127.0.0.1, a port below 1024 that stays the same]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// State directory: keeps the key of the handles and the port
    #[arg(
        long,
        env = "NFSVOL_STATE_DIR",
        default_value = "/var/lib/nfsvol",
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Serve also clients whose port is 1024 or above: every user who reaches the port has root's
    /// rights on the directory then
    #[arg(long)]
    insecure: bool,
    /// Leave the session of the process that started this one
    #[arg(long, hide = true)]
    detach: bool,
}

/// Serves until `stop` is ready.
pub(super) async fn serve(
    args: LocalServerArgs,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    if args.detach {
        local_server::detach();
    }
    let options = Options {
        dir: args.dir,
        listen: args.listen,
        state_dir: args.state_dir,
        any_client_port: args.insecure,
    };
    Ok(local_server::run(&options, stop).await?)
}
