//! The command line.
//!
//! Exit codes: 0 done; 1 refused or failed, with the reason on standard error; 2 wrong usage.

mod adopt;
mod demo;
mod direct;
mod doctor;
mod local_server;
mod migrate;
mod output;
mod repair;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::api::{self, Answers, Ask, Client};
use crate::daemon::settings::{DEFAULT_SOCKET, ServeArgs};
use crate::driver::{Driver, DriverError};
use crate::telemetry;
use nfs::address::Share;

/// Docker volumes that follow a container to any host, on the NFS server you already have.
#[derive(Debug, Parser)]
#[command(
    name = "nfsvol",
    version,
    after_help = "Examples:
  nfsvol serve --share nas:/export    run the daemon
  nfsvol status                       how it and its shares are
  nfsvol ls                           volumes of all hosts
  nfsvol inspect db                   one volume in full
  nfsvol trash ls                     removed volumes
  nfsvol restore db                   bring one back
  nfsvol doctor                       find out what is wrong
  nfsvol demo                         see it work here, without Docker"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon that Docker talks to
    Serve(Box<ServeArgs>),
    /// List the volumes of all hosts
    #[command(
        after_help = "Examples:\n  nfsvol ls\n  nfsvol ls --json | jq -r '.[].name'\n  nfsvol ls --share nas:/export"
    )]
    Ls(Common),
    /// Show one volume in full
    #[command(
        after_help = "Examples:\n  nfsvol inspect db\n  nfsvol inspect db --json | jq .status.holders"
    )]
    Inspect {
        /// Name of the volume
        name: String,
        #[command(flatten)]
        common: Common,
    },
    /// Show this host's daemon: shares, their health, attachments
    #[command(after_help = "Examples:\n  nfsvol status\n  nfsvol status --json | jq .shares")]
    Status(OfDaemon),
    /// Find out what is wrong, from a share's name to its bytes and on this host; says what to do
    #[command(
        after_help = "Exit code: 0 when nothing failed, 1 otherwise.\n\nExamples:\n  nfsvol doctor\n  \
nfsvol doctor nas:/export\n  nfsvol doctor --json | jq '.findings[] | select(.outcome == \"failed\")'"
    )]
    Doctor(doctor::DoctorArgs),
    /// List removed volumes, or delete them for good
    #[command(subcommand)]
    #[command(
        after_help = "Examples:\n  nfsvol trash ls\n  nfsvol trash purge db\n\n\
`nfsvol restore` brings one back."
    )]
    Trash(Trash),
    /// Bring a removed volume back
    #[command(after_help = "Examples:
  nfsvol restore db                 the volume db that was removed last
  nfsvol restore db --as db-old     under another name
  nfsvol restore db.20261123T101500Z.0f3a9c21
  nfsvol restore db --share nas:/export    where no daemon runs")]
    Restore {
        /// Name of the volume, or one entry of `nfsvol trash ls`
        name: String,
        /// Name to restore it under [default: the one that it had]
        #[arg(long = "as", value_name = "NAME")]
        rename: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Show the main job without Docker: two hosts, one volume
    Demo(demo::DemoArgs),
    /// Serve a local directory over NFS for one machine; `serve --share embedded:/DIR` does it
    #[command(hide = true)]
    EmbeddedServer(local_server::LocalServerArgs),
    /// Free every process that waits for a volume whose server is away
    #[command(
        after_help = "The volume fails for all who use it, and data that was not synced may be \
lost;\na container that is started afterwards gets a new mount. On the kernel data path only an\n\
exclusive volume can be aborted, and its containers are killed; the others have a mount in\n\
common. `nfsvol inspect` shows the data path.\n\nExample:\n  nfsvol abort db"
    )]
    Abort {
        /// Name of the volume, which is mounted on this host
        name: String,
        #[command(flatten)]
        common: OfDaemon,
    },
    /// Make volumes of directories that are on the home share already
    #[command(
        after_help = "A volume is named after the last part of its directory, unless another \
name is given. The data is\nleft as it is, and no removal of the volume ever touches it.\n\n\
Exit code: 0 when each directory is a volume now, 1 otherwise.\n\nExamples:\n  \
nfsvol adopt db apps/web\n  nfsvol adopt shop-db=apps/shop/db\n  \
nfsvol adopt --dry-run --json db apps/web"
    )]
    Adopt(adopt::AdoptArgs),
    /// Put back what a server's power failure has torn on the home share
    #[command(
        after_help = "It shows first what it would put back from this host's copy, and asks. A \
record is put back only\nwhere it can be shown that the volume was not removed; what this host \
does not know, another one\nmay: run it there.\n\nExit code: 0 when nothing is torn any more, \
1 otherwise.\n\nExamples:\n  nfsvol repair\n  nfsvol repair db\n  nfsvol repair --dry-run \
--json\n  nfsvol repair --yes"
    )]
    Repair(repair::RepairArgs),
    /// Take over volumes of Docker's `local` driver
    #[command(
        after_help = "Without --yes it only shows what it would do: volumes with type=nfs \
get a record for the\nsame directory, and not a byte is copied. With --copy the files of volumes that are\n\
plain directories of this host are copied into new volumes and compared; a copy that was\n\
interrupted goes on when the same command is run again.\n\nExit code: 0 when nothing was \
refused, 1 otherwise.\n\nExamples:\n  nfsvol migrate\n  nfsvol migrate --yes\n  \
nfsvol migrate --yes shop_db --as db\n  nfsvol migrate --copy uploads -o mode=0750"
    )]
    Migrate(migrate::MigrateArgs),
    /// The process that serves one volume on the FUSE data path; the daemon starts it
    #[command(name = crate::fuse::worker::SUBCOMMAND, hide = true)]
    FuseWorker,
    /// The process that fences one exclusive volume on the kernel data path; the daemon starts it
    #[command(name = crate::fence::SUBCOMMAND, hide = true)]
    KernelGuard,
    /// The first process of a managed plugin (config.json)
    #[command(hide = true)]
    ManagedPlugin,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  nfsvol completion bash > /etc/bash_completion.d/nfsvol")]
    Completion {
        /// The shell that is to complete
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory; `make install` does it
    #[command(hide = true)]
    Man { dir: PathBuf },
}

#[derive(Debug, Subcommand)]
enum Trash {
    /// List removed volumes, oldest first
    #[command(after_help = "Examples:\n  nfsvol trash ls\n  \
nfsvol trash ls --json | jq -r '.[].entry'")]
    Ls(Common),
    /// Delete removed volumes for good
    #[command(after_help = "Examples:\n  nfsvol trash purge db\n  nfsvol trash purge --all")]
    Purge {
        #[command(flatten)]
        what: Purged,
        #[command(flatten)]
        common: Common,
    },
}

/// What `nfsvol trash purge` deletes.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Purged {
    /// Name of a volume (all its entries), or one entry of `nfsvol trash ls`
    name: Option<String>,
    /// Everything in the trash
    #[arg(long)]
    all: bool,
}

/// Flags of the commands that only the daemon can answer.
#[derive(Debug, clap::Args)]
struct OfDaemon {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Socket of the daemon
    #[arg(long, env = SOCKET_NAME, default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
}

/// What names the daemon's socket where no flag does.
const SOCKET_NAME: &str = "NFSVOL_SOCKET";

/// Flags of the commands that ask the daemon, or a share itself.
#[derive(Debug, clap::Args)]
struct Common {
    /// Print JSON
    #[arg(long)]
    json: bool,
    // The environment is looked at below: a name in it does not speak against --share.
    #[arg(long, value_name = "PATH", help = socket_help())]
    socket: Option<PathBuf>,
    /// Ask this share itself, as where no daemon runs
    #[arg(long, value_name = "SHARE", conflicts_with = "socket")]
    share: Option<Share>,
}

/// As clap says it of the others.
fn socket_help() -> String {
    format!("Socket of the daemon [env: {SOCKET_NAME}] [default: {DEFAULT_SOCKET}]")
}

impl From<OfDaemon> for Common {
    fn from(flags: OfDaemon) -> Self {
        Self {
            json: flags.json,
            socket: Some(flags.socket),
            share: None,
        }
    }
}

impl Common {
    /// Asks the daemon, or the share itself.
    async fn ask<A: Ask>(&self, ask: A) -> anyhow::Result<A::Answer>
    where
        Driver: Answers<A, Error = DriverError>,
    {
        if let Some(share) = &self.share {
            return direct::ask(share, ask).await;
        }
        let named = || std::env::var_os(SOCKET_NAME).map(PathBuf::from);
        let socket = self.socket.clone().or_else(named);
        let socket = socket.unwrap_or_else(|| DEFAULT_SOCKET.into());
        Ok(Client::connect(&socket).await?.ask(&ask).await?)
    }

    /// Asks, and prints the answer for people, or as JSON.
    fn show<A: Ask>(&self, ask: A, words: fn(&A::Answer) -> String) -> anyhow::Result<()>
    where
        Driver: Answers<A, Error = DriverError>,
    {
        let answer = runtime()?.block_on(self.ask(ask))?;
        let text = match self.json {
            true => output::json(&answer)?,
            false => words(&answer),
        };
        print(text.as_bytes())
    }
}

/// Parses the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _points = fail::FailScenario::setup();
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "nfsvol: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => {
            telemetry::init(args.log_format, &args.log)?;
            runtime()?.block_on(crate::daemon::serve::serve(&args))
        }
        Command::EmbeddedServer(args) => {
            logged(async { local_server::serve(args, crate::daemon::serve::stopped()).await })
        }
        Command::ManagedPlugin => runtime()?.block_on(crate::daemon::managed::run()),
        Command::FuseWorker => Ok(crate::fuse::worker::run()?),
        Command::KernelGuard => Ok(crate::fence::process::run()?),

        Command::Ls(common) => common.show(api::Ls {}, |lines| output::volumes(lines)),
        Command::Inspect { name, common } => common.show(api::Inspect { name }, output::tree),
        Command::Status(common) => Common::from(common).show(api::Status {}, output::tree),
        Command::Trash(Trash::Ls(common)) => {
            common.show(api::Trash {}, |entries| output::trash(entries))
        }
        Command::Trash(Trash::Purge { what, common }) => {
            let purge = match what.name {
                Some(name) => api::TrashPurge::Name(name),
                // One of the two is required.
                None => api::TrashPurge::All,
            };
            common.show(purge, output::purged)
        }
        Command::Restore {
            name,
            rename,
            common,
        } => common.show(api::Restore { name, rename }, output::restored),
        Command::Abort { name, common } => {
            Common::from(common).show(api::Abort { name }, output::tree)
        }
        Command::Adopt(args) => runtime()?.block_on(adopt::adopt(args)),
        Command::Repair(args) => runtime()?.block_on(repair::repair(args)),
        Command::Migrate(args) => runtime()?.block_on(migrate::migrate(args)),
        Command::Doctor(args) => runtime()?.block_on(doctor::doctor(args)),

        Command::Demo(args) => demo::demo(&args),
        Command::Completion { shell } => print(&completion(shell)),
        Command::Man { dir } => Ok(clap_mangen::generate_to(Cli::command(), dir)?),
    }
}

/// Runs what has a log of its own and no flags for it.
fn logged(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    telemetry::init(telemetry::Format::Text, "info")?;
    runtime()?.block_on(work)
}

/// Writes to standard output; a reader that has gone (`nfsvol ls | head`) is no error.
fn print(text: &[u8]) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

/// A script that completes what people type, and not what the daemon starts by itself.
fn completion(shell: clap_complete::Shell) -> Vec<u8> {
    let all = Cli::command();
    let shown = all
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut shown = clap::Command::new("nfsvol")
        .args(all.get_arguments().cloned())
        .subcommands(shown.cloned());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, "nfsvol", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_knows_what_people_type() {
        use clap::ValueEnum;
        use std::collections::HashSet;
        for shell in clap_complete::Shell::value_variants() {
            let script = String::from_utf8(completion(*shell)).unwrap();
            let is_of_word = |ch: char| ch.is_alphanumeric() || ch == '-';
            let words: HashSet<_> = script.split(|ch| !is_of_word(ch)).collect();
            for command in Cli::command().get_subcommands() {
                let name = command.get_name();
                assert_eq!(
                    words.contains(name),
                    !command.is_hide_set(),
                    "{shell} {name}"
                );
            }
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Without its prompt, what stands behind it, and what its output goes to.
    fn command_in(line: &str) -> Option<Vec<&str>> {
        let line = line.trim_start();
        let line =
            line.split_once("# ")
                .map_or(line, |(prompt, line)| match prompt.contains(' ') {
                    true => prompt,
                    false => line,
                });
        let line = line.strip_prefix("nfsvol ")?;
        let end = ["  ", " |", " >", " &"]
            .iter()
            .filter_map(|end| line.find(end))
            .min();
        let words = line[..end.unwrap_or(line.len())].split_whitespace();
        Some(words.map(|word| word.trim_matches('\'')).collect())
    }

    #[test]
    fn whatever_command_is_shown_is_one() {
        fn examples(command: &clap::Command, all: &mut String) {
            if let Some(help) = command.get_after_help() {
                all.push_str(&format!("{help}\n"));
            }
            command
                .get_subcommands()
                .for_each(|command| examples(command, all));
        }
        let mut shown = String::new();
        examples(&Cli::command(), &mut shown);
        let documents = [
            include_str!("../README.md"),
            include_str!("../docs/OPERATIONS.md"),
        ];
        for block in documents
            .iter()
            .flat_map(|text| text.split("```console\n").skip(1))
        {
            shown.push_str(block.split("```").next().unwrap_or_default());
        }
        let commands: Vec<_> = shown.lines().filter_map(command_in).collect();
        assert!(commands.len() > 40, "{commands:?}");
        for words in commands {
            let parsed = Cli::try_parse_from([&["nfsvol"], words.as_slice()].concat());
            assert!(parsed.is_ok(), "{words:?}: {}", parsed.unwrap_err());
        }
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command) {
            if command.get_name() == "help" || command.is_hide_set() {
                return;
            }
            if command.has_subcommands() && command.get_name() != "nfsvol" {
                return command.get_subcommands().for_each(check);
            }
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("nfsvol "), "{}", command.get_name());
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
