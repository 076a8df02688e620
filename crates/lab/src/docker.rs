//! A real dockerd on a node, images made here, and `nfsvol serve` beside it.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, ensure};

use super::node::{Node, Process};
use super::process::{self, Output, Task};
use super::{Lab, PATIENCE, Result, Shared, checkout, tried, wait_for};

pub(crate) const DOCKERD: &str = "/usr/sbin/dockerd";
/// The client that belongs to that engine; a newer one in PATH may refuse its API.
pub const DOCKER: &str = "/usr/bin/docker";
pub const BUSYBOX: &str = "/usr/bin/busybox";
/// The image that every engine has.
pub const IMAGE: &str = "busybox";

/// A Docker host: a node with its engine.
#[derive(Debug)]
pub struct Engine {
    node: &'static Node,
    dockerd: Process<'static>,
    url: String,
}

impl Engine {
    /// Starts the engine on a node and gives it the image [`IMAGE`].
    pub fn start(lab: &'static Lab, node: &'static Node) -> Result<Self> {
        Self::start_with(lab, node, &[])
    }

    /// As [`Self::start`] with further arguments for dockerd.
    pub(crate) fn start_with(
        lab: &'static Lab,
        node: &'static Node,
        args: &[&str],
    ) -> Result<Self> {
        let socket = node.dir().join("docker.sock");
        let parent = format!("/{}/{}", lab.cgroup(), node.name());
        let (url, mut argv) = if node.is_guest() {
            // A guest's kernel lacks what dockerd wants for its own networks.
            (
                format!("tcp://{}:2375", node.ip()),
                vec!["--iptables=false", "--ip6tables=false"],
            )
        } else {
            (
                format!("unix://{}", socket.display()),
                vec!["--cgroup-parent", &parent],
            )
        };
        argv.extend(["--bridge=none", "--storage-driver=overlay2"]);
        argv.extend(["-H", "unix:///run/docker.sock", "-H", &url]);
        let argv: Vec<&str> = [DOCKERD]
            .into_iter()
            .chain(argv)
            .chain(args.iter().copied())
            .collect();
        let dockerd = node.spawn("dockerd", &argv)?;
        Self { node, dockerd, url }.with_image()
    }

    /// The engine that something else started on a node, reached at `url`.
    pub fn started(node: &'static Node, url: String) -> Result<Self> {
        let dockerd = Process::new(node, "dockerd", Task::new(&[DOCKERD]))?;
        Self { node, dockerd, url }.with_image()
    }

    fn with_image(self) -> Result<Self> {
        self.ready()?;
        if self.docker(&["image", "inspect", IMAGE])?.code != 0 {
            self.image(IMAGE, "", &["CMD [\"sh\"]"])?;
        }
        Ok(self)
    }

    fn ready(&self) -> Result {
        wait_for(
            &format!("dockerd on {}", self.node.name()),
            PATIENCE,
            || {
                process::run(&[DOCKER, "-H", &self.url, "version"])
                    .is_ok_and(|output| output.code == 0)
            },
        )
        .with_context(|| self.dockerd.log())
    }

    pub fn node(&self) -> &'static Node {
        self.node
    }

    pub fn dockerd(&self) -> &Process<'static> {
        &self.dockerd
    }

    /// Where the test process reaches the engine: `unix://…` or `tcp://…`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Starts dockerd again after it was stopped or killed, and waits until it answers.
    pub fn restart(&self) -> Result {
        if self.dockerd.is_running()? {
            self.dockerd.stop()?;
        }
        self.dockerd.start()?;
        self.ready()
    }

    /// `docker ARGS` against this engine.
    pub fn docker(&self, args: &[&str]) -> Result<Output> {
        let argv: Vec<&str> = [DOCKER, "-H", &self.url]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        let mut output = process::run(&argv)?;
        output.command = format!("{}$ docker {}", self.node.name(), args.join(" "));
        Ok(output)
    }

    /// `docker ARGS` that must succeed; its standard output.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        self.docker(args)?.ok()
    }

    /// Waits until the engine lists the plugin, without any use of it: Swarm looks at this list.
    pub fn hears_of_the_plugin(&self) -> Result {
        wait_for("Docker to list the plugin", PATIENCE, || {
            self.ok(&["info", "-f", "{{.Plugins.Volume}}"])
                .is_ok_and(|list| list.contains("nfsvol"))
        })
    }

    /// Makes an image: busybox, the files that `script` makes in its root directory (`$PWD`),
    /// and Dockerfile instructions (`CMD`, `VOLUME`, `USER`, `ENV`, …).
    pub fn image(&self, name: &str, script: &str, instructions: &[&str]) -> Result {
        let root = tempfile::Builder::new()
            .prefix("image-")
            .tempdir_in(self.node.dir())?;
        let tar = root.path().join("root.tar");
        let tar = tar.to_str().context("the lab's path is not UTF-8")?;
        let base = busybox_root()?;
        process::sh(&format!(
            "cd {}; mkdir root; cp -a {base}/. root/; (cd root; {script}
             ); tar -C root -cf {tar} .",
            root.path().display()
        ))?
        .ok()?;
        let mut args = vec!["import"];
        for instruction in instructions {
            args.extend(["--change", instruction]);
        }
        args.extend([tar, name]);
        self.ok(&args)?;
        Ok(())
    }

    /// Runs a shell script in a new container of [`IMAGE`] with this volume at /data, and
    /// answers its output. The container is removed.
    pub fn run_in(&self, volume: &str, script: &str) -> Result<String> {
        let mount = format!("{volume}:/data");
        self.ok(&[
            "run",
            "--rm",
            "--network",
            "host",
            "--volume-driver",
            "nfsvol",
            "-v",
            &mount,
            IMAGE,
            "sh",
            "-euc",
            script,
        ])
    }

    /// Makes nfsvol a managed plugin of the engine, as `make plugin` does with a static binary; this
    /// one is dynamic, so it brings its libraries.
    pub fn managed_plugin(&self) -> Result {
        let stripped = Lab::get()?.dir().join("nfsvol");
        let stripped = stripped.display();
        process::sh(&format!(
            "exec 9>{stripped}.lock; flock 9
             [ -e {stripped} ] || strip -o {stripped} {}
             LIBRARIES=1 DOCKER='{DOCKER} -H {}' {}/plugin/create.sh {stripped}",
            Nfsvol::binary(),
            self.url,
            checkout(),
        ))?
        .ok()
        .map(drop)
    }

    /// Starts `nfsvol serve ARGS` beside the engine.
    pub fn nfsvol(&self, args: &[&str]) -> Result<Nfsvol<'static>> {
        Nfsvol::start(self.node, args, &[])
    }
}

/// The root file system of [`IMAGE`], made once.
fn busybox_root() -> Result<String> {
    static ROOT: Shared<String> = Shared::new();
    let root = ROOT.get(|| {
        let root = Lab::get()?.dir().join("busybox");
        fs::create_dir(&root)?;
        let root = root
            .to_str()
            .context("the lab's path is not UTF-8")?
            .to_owned();
        process::sh(&format!(
            "cd {root}; mkdir -p bin etc proc sys dev root; mkdir -m 1777 tmp; cp {BUSYBOX} bin/
             bin/busybox --list | while read -r name; do
                 [ $name = busybox ] || ln -s busybox bin/$name
             done
             echo root:x:0:0:root:/root:/bin/sh >etc/passwd; echo root:x:0: >etc/group"
        ))?
        .ok()?;
        Ok(root)
    })?;
    Ok(root.clone())
}

/// A running `nfsvol serve`.
#[derive(Debug)]
pub struct Nfsvol<'a> {
    process: Process<'a>,
}

impl<'a> Nfsvol<'a> {
    pub const SOCKET: &'static str = "/run/docker/plugins/nfsvol.sock";

    /// The program that is tried.
    pub fn binary() -> &'static str {
        tried().program
    }

    /// Starts it on a node with these arguments of `serve` and this environment.
    pub fn start(node: &'a Node, args: &[&str], env: &[(&str, &str)]) -> Result<Self> {
        Self::start_binary(node, Self::binary(), args, env)
    }

    /// As [`Self::start`], of another build.
    pub fn start_binary(
        node: &'a Node,
        binary: &str,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Self> {
        let argv: Vec<&str> = [binary, "serve"]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        let env: HashMap<String, String> = env
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let process = Process::new(
            node,
            "nfsvol",
            Task {
                env,
                ..Task::new(&argv)
            },
        )?;
        let nfsvol = Self { process };
        nfsvol.up()?;
        Ok(nfsvol)
    }

    pub fn process(&self) -> &Process<'a> {
        &self.process
    }

    /// Starts it again after its end and waits for its socket.
    pub fn up(&self) -> Result {
        self.process.start()?;
        let node = self.process.node();
        let mut has_ended = false;
        wait_for("nfsvol's socket", PATIENCE, || {
            let listens = node.run(&["grep", "-q", Self::SOCKET, "/proc/net/unix"]);
            has_ended = self.process.is_running().is_ok_and(|running| !running);
            has_ended || listens.is_ok_and(|output| output.code == 0)
        })
        .with_context(|| self.process.log())?;
        ensure!(!has_ended, "nfsvol has ended: {}", self.process.log());
        Ok(())
    }

    /// SIGTERM, wait for the end, start.
    pub fn restart(&self) -> Result {
        self.process.stop()?;
        self.up()
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result {
        self.process.kill()
    }

    /// The answer to GET /metrics on its socket, with the head.
    pub fn metrics(&self) -> Result<String> {
        // perl-base is part of every Debian.
        let script = format!(
            "my $s = IO::Socket::UNIX->new('{}') or die $!;
             print $s \"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n\";
             print while <$s>;",
            Self::SOCKET
        );
        let argv = ["perl", "-MIO::Socket::UNIX", "-e", &script];
        self.process.node().ok(&argv)
    }

    /// `nfsvol ARGS` on the same node.
    pub fn command(&self, args: &[&str]) -> Result<Output> {
        let argv: Vec<&str> = [Self::binary()]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        self.process.node().run(&argv)
    }
}
