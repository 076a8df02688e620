//! Moving in: directories that are on the share already, volumes of Docker's `local` driver, and
//! Compose files that were written for it.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use lab::process::{self, Task};
use lab::{
    Call, DataPath, Export, Ganesha, Host, Lab, Nfsvol, Output, PATIENCE, Part, Result, Shared,
    calls, trial, wait_for,
};
use serde_json::Value;

const PARTS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
const COMPOSE: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse, Part::Compose];
const KERNEL: &[Part] = &[Part::Docker, Part::Ganesha, Part::Guest];
const EXPORT: &str = "/srv/export";

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("adopt_directories", PARTS, adopt),
            trial("migrate_nfs_volumes", PARTS, migrate),
            trial("migrate_a_volume_in_use", KERNEL, migrate_in_use),
            trial("copy_a_local_volume", PARTS, copy),
            trial("what_docker_mounts_is_not_copied", PARTS, mounted),
            trial("compose_files", COMPOSE, compose),
        ]
    })
}

/// A host, and the server that all trials share.
struct Site {
    nas: &'static Ganesha,
    host: Host,
}

fn site(lab: &'static Lab) -> Result<&'static Site> {
    static SITE: Shared<Site> = Shared::new();
    SITE.get(|| {
        let nas = Ganesha::start(lab, "nas", &[Export::new(EXPORT)])?;
        let nas: &'static Ganesha = Box::leak(Box::new(nas));
        let host = Host::start(lab, "host", DataPath::Fuse, &nas.share(EXPORT))?;
        Ok(Site { nas, host })
    })
}

impl Site {
    /// Makes a directory on the server with a file in it.
    fn directory(&self, path: &str, contents: &str) -> Result {
        self.nas.node().sh(&format!(
            "cd {EXPORT}; mkdir -p {path}; chmod 0700 {path}; echo {contents} >{path}/file"
        ))?;
        Ok(())
    }

    fn nfsvol(&self, line: &str) -> Result<Output> {
        let args: Vec<&str> = line.split_whitespace().collect();
        self.host.nfsvol().command(&args)
    }

    /// What `nfsvol LINE --json` says, whether it succeeds or not.
    fn json(&self, line: &str) -> Result<(i32, Value)> {
        let output = self.nfsvol(&format!("{line} --json"))?;
        let said = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
        Ok((output.code, said))
    }

    /// A command of the docker command line as nfsvol shows it.
    fn follow(&self, command: &str) -> Result<String> {
        let line = command
            .strip_prefix("docker ")
            .context("no docker command")?;
        self.host.ok(line)
    }
}

fn adopt(lab: &'static Lab) -> Result {
    let site = site(lab)?;
    site.directory("adopted/rows", "kept")?;
    site.directory("adopted/shop/rows", "sold")?;

    let (code, said) = site.json("adopt --dry-run adopted/rows adopted/absent")?;
    ensure!(code == 1 && said[0]["outcome"] == "possible", "{said}");
    let reason = said[1]["reason"].as_str().unwrap_or_default();
    ensure!(
        reason.contains("there is no directory adopted/absent"),
        "{said}"
    );
    ensure!(site.host.volume("rows")?.is_none());

    let said = site
        .nfsvol("adopt adopted/rows shop-rows=adopted/shop/rows")?
        .ok()?;
    ensure!(said.matches("is a volume now").count() == 2, "{said}");
    let read = site.host.run(
        "-v rows:/rows -v shop-rows:/shop",
        "cat /rows/file /shop/file",
    )?;
    ensure!(read == "kept\nsold", "{read}");
    let (code, said) = site.json("adopt adopted/rows")?;
    ensure!(code == 0 && said[0]["outcome"] == "exists", "{said}");

    // Each refusal is told, and what is right beside it is done.
    site.directory("adopted/late", "late")?;
    let output = site.nfsvol("adopt adopted inner=adopted/shop/rows adopted/late")?;
    ensure!(
        output.code == 1 && output.stdout.contains("overlaps with"),
        "{output}"
    );
    ensure!(
        output.stderr.contains("2 directories were refused"),
        "{output}"
    );
    ensure!(output.stdout.contains("late"), "{output}");

    // Removing never touches what was found.
    site.host.ok("volume rm rows shop-rows")?;
    let left = fs::read_to_string(site.nas.local(EXPORT).join("adopted/rows/file"))?;
    ensure!(left == "kept\n", "{left}");

    // Also where no daemon runs.
    let share = site.nas.share(EXPORT);
    let again = [Nfsvol::binary(), "adopt", "--share", &share, "adopted/rows"];
    site.nas.node().ok(&again)?;
    let read = site.host.run("-v rows:/rows", "cat /rows/file")?;
    ensure!(read == "kept", "{read}");
    Ok(())
}

fn migrate(lab: &'static Lab) -> Result {
    let site = site(lab)?;
    let host = &site.host;
    site.directory("local/web", "page")?;
    let ip = site.nas.ip();
    let local = |name: &str, server: &str, dir: &str| {
        host.ok(&format!(
            "volume create -o type=nfs -o o=addr={server},rw,nfsvers=3 \
             -o device=:{EXPORT}/local/{dir} {name}"
        ))
    };
    local("web", &ip, "web")?;
    local("again", &ip, "web")?;
    local("broken", &ip, "absent")?;
    host.ok("volume create plain")?;
    host.ok("create --name=user -v web:/web busybox")?;

    // Shows, and changes nothing.
    let (code, said) = site.json("migrate")?;
    ensure!(code == 1, "{said}");
    let of = |said: &Value, name: &str| -> Result<Value> {
        let all = said.as_array().context("no list")?;
        let line = all.iter().find(|line| line["local"] == name);
        Ok(line
            .with_context(|| format!("no {name} in {said}"))?
            .clone())
    };
    ensure!(of(&said, "web")?["outcome"] == "possible", "{said}");
    ensure!(of(&said, "web")?["used_by"][0] == "user", "{said}");
    ensure!(of(&said, "broken")?["outcome"] == "refused", "{said}");
    ensure!(of(&said, "plain").is_err(), "{said}");
    let listed = site.nfsvol("ls")?.ok()?;
    ensure!(!listed.contains("local/web"), "{listed}");
    let shown = site.nfsvol("migrate web")?.ok()?;
    ensure!(shown.contains("Nothing was changed"), "{shown}");

    let (code, said) = site.json("migrate --yes web again")?;
    ensure!(
        code == 0 && of(&said, "web")?["outcome"] == "made",
        "{said}"
    );
    // Until the local volume has gone, Docker's name is that one's.
    ensure!(host.inspect("web")?["Driver"] == "local");
    for name in ["web", "again"] {
        for command in of(&said, name)?["next"].as_array().context("next")? {
            site.follow(command.as_str().unwrap_or_default())?;
        }
        ensure!(host.inspect(name)?["Driver"] == "nfsvol");
    }
    let read = host.run(
        "-v web:/web -v again:/again",
        "cat /web/file; echo new >/again/file",
    )?;
    ensure!(read == "page", "{read}");
    host.ok("volume rm again web")?;
    let left = fs::read_to_string(site.nas.local(EXPORT).join("local/web/file"))?;
    ensure!(left == "new\n", "{left}");

    // Under another name, beside the local volume.
    local("web", &ip, "web")?;
    site.nfsvol("migrate --yes web --as site")?.ok()?;
    ensure!(host.inspect("site")?["Driver"] == "nfsvol");
    ensure!(host.inspect("web")?["Driver"] == "local");
    let (code, said) = site.json("migrate web --as site")?;
    ensure!(
        code == 0 && of(&said, "web")?["outcome"] == "exists",
        "{said}"
    );

    for (line, reason) in [
        ("migrate nothing", "has no volume nothing"),
        ("migrate plain", "a directory of this host"),
        ("migrate web again --as other", "--as names one new volume"),
    ] {
        let refused = site.nfsvol(line)?.fails()?;
        ensure!(refused.contains(reason), "{refused}");
    }
    host.ok("volume rm site web broken plain")?;
    Ok(())
}

/// On a host whose kernel has mounted the local volume for a container that writes.
fn migrate_in_use(lab: &'static Lab) -> Result {
    let nas = site(lab)?.nas;
    site(lab)?.directory("live", "old")?;
    let host = Host::start(lab, "guest", DataPath::Kernel, &nas.share(EXPORT))?;
    let guest = Site { nas, host };
    let host = &guest.host;
    host.ok(&format!(
        "volume create -o type=nfs -o o=addr={},rw,nfsvers=3,nolock -o device=:{EXPORT}/live live",
        nas.ip()
    ))?;
    let write = "n=0; while :; do n=$((n+1)); echo $n >/live/new; sync /live/new; mv /live/new /live/count; sleep 0.2; done";
    let run = [
        "run",
        "-d",
        "--network=host",
        "--name=writer",
        "-v",
        "live:/live",
        "busybox",
    ];
    host.engine()
        .ok(&[&run[..], &["sh", "-euc", write]].concat())?;
    let count = || -> u32 {
        let count = fs::read_to_string(nas.local(EXPORT).join("live/count"));
        count
            .ok()
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0)
    };
    let goes_on = |what: &str| {
        let before = count();
        wait_for(what, PATIENCE, || count() > before + 2)
    };
    goes_on("the container to write")?;

    // The container has what it had.
    let (code, said) = guest.json("migrate --yes live")?;
    ensure!(code == 0 && said[0]["used_by"][0] == "writer", "{said}");
    goes_on("the container to write on")?;
    ensure!(host.inspect("live")?["Driver"] == "local");

    // And after the commands that are shown, a new one has all of it.
    for command in said[0]["next"].as_array().context("next")? {
        guest.follow(command.as_str().unwrap_or_default())?;
    }
    let written = count();
    ensure!(host.inspect("live")?["Driver"] == "nfsvol");
    let read = host.run("-v live:/live", "cat /live/file /live/count")?;
    ensure!(read == format!("old\n{written}"), "{read}, {written}");
    ensure!(host.inspect("live")?["Status"]["data_path"] == "kernel");
    host.ok("volume rm live")?;
    ensure!(count() == written, "removed with its volume");
    Ok(())
}

fn copy(lab: &'static Lab) -> Result {
    let site = site(lab)?;
    let host = &site.host;
    host.ok("volume create uploads")?;
    let source = host.inspect("uploads")?;
    let source = source["Mountpoint"].as_str().context("no mount point")?;
    host.node().sh(&format!(
        "cd {source}; mkdir -p -m 2770 team; echo text >team/file; chown 1234:55 team team/file
         ln team/file other-name; ln -s team/file link; mkfifo pipe
         truncate -s 128M sparse; echo end >>sparse
         dd if=/dev/urandom of=large bs=1M count=8 status=none
         touch -d '2001-02-03 04:05:06' team/file team pipe"
    ))?;
    host.engine().ok(&[
        "run",
        "-d",
        "--name=writer",
        "--network=host",
        "-v",
        "uploads:/up",
        "busybox",
        "sleep",
        "1000",
    ])?;
    let refused = site.nfsvol("migrate --copy uploads")?.fails()?;
    ensure!(
        refused.contains("running containers use it (writer)"),
        "{refused}"
    );
    ensure!(
        !site.nas.local(EXPORT).join("uploads").exists(),
        "made all the same"
    );
    host.ok("stop -t 0 writer")?;

    // As a run leaves it that was killed: the volume is there, and held.
    host.ok("volume create -d nfsvol -o subdir=moved/uploads copy")?;
    calls::one(host.node(), Call::mount("copy", "nfsvol-migrate"))?.ok()?;
    let (_, said) = site.json("migrate --copy uploads --as copy -o subdir=moved/uploads")?;
    ensure!(
        said[0]["copied"] == 6 && said[0]["links_left_out"] == 0,
        "{said}"
    );
    let copy = site.nas.local(EXPORT).join("moved/uploads");
    // What both say of themselves; the size of a directory is its file system's.
    let list = "stat -c '%n %F %a %u %g %h' large link other-name pipe sparse team team/file
                stat -c '%n %Y' large other-name sparse team team/file
                stat -c '%n %s' large sparse team/file";
    let ours = host.node().sh(&format!("cd {source}; {list}"))?;
    let copied = process::sh(&format!("cd {}; {list}", copy.display()))?.ok()?;
    ensure!(ours == copied, "{ours}\n-- copied --\n{copied}");
    process::sh(&format!(
        "cd {}; test \"$(readlink link)\" = team/file; test $(du -k sparse | cut -f1) -lt 20000
         cmp large {source_on_disk}/large; tail -c 4 sparse | grep -qx end",
        copy.display(),
        source_on_disk = host
            .node()
            .dir()
            .join("disk/docker")
            .join(
                source
                    .strip_prefix("/var/lib/docker/")
                    .context("elsewhere")?
            )
            .display(),
    ))?
    .ok()?;
    // Nobody holds it any more.
    let shown = host.inspect("copy")?;
    ensure!(shown["Status"]["attachments"].is_null(), "{shown}");
    host.ok("volume rm copy")?;

    // Under the name that it has, by the commands that are shown.
    let (code, said) = site.json("migrate --copy uploads")?;
    ensure!(code == 0 && said[0]["copied"] == 6, "{said}");
    for command in said[0]["next"].as_array().context("next")? {
        site.follow(command.as_str().unwrap_or_default())?;
    }
    let volume = host.inspect("uploads")?;
    ensure!(volume["Driver"] == "nfsvol", "{volume}");
    let read = host.run("-v uploads:/up", "cat /up/link; ls -A /up")?;
    ensure!(
        read == "text\nlarge\nlink\nother-name\npipe\nsparse\nteam",
        "{read}"
    );
    host.ok("volume rm uploads")?;

    // Neither over files that are there.
    host.ok("volume create taken")?;
    site.nas
        .node()
        .sh(&format!("cd {EXPORT}; mkdir taken; echo mine >taken/file"))?;
    let refused = site.nfsvol("migrate --copy taken")?.fails()?;
    ensure!(refused.contains("holds files already (file)"), "{refused}");
    host.ok("volume rm taken")?;
    Ok(())
}

/// Volumes whose files are in Docker's directory only while a container runs.
fn mounted(lab: &'static Lab) -> Result {
    let site = site(lab)?;
    let host = &site.host;
    let media = "/var/lib/docker/my media";
    host.node().sh(&format!(
        "mkdir -p '{media}'; cd '{media}'; touch one two three"
    ))?;
    let local = |name: &str, kind: &str, o: &str, device: &str| {
        let options = [
            format!("type={kind}"),
            format!("o={o}"),
            format!("device={device}"),
        ];
        let [kind, o, device] = options.each_ref().map(String::as_str);
        let args = ["volume", "create", "-o", kind, "-o", o, "-o", device, name];
        host.engine().ok(&args)
    };
    local("bound", "none", "bind", media)?;
    local("memory", "tmpfs", "size=1m", "tmpfs")?;
    local(
        "windows",
        "cifs",
        "addr=10.0.0.5,username=me",
        "//10.0.0.5/films",
    )?;
    // As the refusal says it, and without the driver's name that `host.run` adds.
    let run = |volumes: &str, script: &str| {
        let line = format!("run --network=host --rm {volumes} busybox sh -euc");
        let args: Vec<&str> = line.split_whitespace().chain([script]).collect();
        host.engine().ok(&args)
    };
    let there = run("-v bound:/b", "ls /b | wc -l")?;
    ensure!(there == "3", "{there}");
    for (name, what) in [
        (
            "bound",
            "the directory /var/lib/docker/my media of this host (type=none, o=bind)",
        ),
        ("memory", "tmpfs with type=tmpfs"),
        ("windows", "//10.0.0.5/films with type=cifs"),
    ] {
        for command in ["migrate", "migrate --yes", "migrate --copy"] {
            let refused = site.nfsvol(&format!("{command} {name}"))?.fails()?;
            ensure!(
                refused.contains(&format!("its driver mounts {what}")),
                "{refused}"
            );
            ensure!(!refused.contains("docker volume rm"), "{refused}");
        }
        ensure!(
            !site.nas.local(EXPORT).join(name).exists(),
            "made all the same"
        );
    }
    // What the refusal says to do brings all of it.
    host.ok("volume create -d nfsvol films")?;
    run("-v bound:/from:ro -v films:/to", "cp -a /from/. /to")?;
    let copied = run("-v films:/f", "ls /f | wc -l")?;
    ensure!(copied == "3", "{copied}");
    host.ok("volume rm films bound memory windows")?;
    Ok(())
}

/// `docker-compose LINE` on a file of docs/examples, with what it names put in for the lab's.
struct Compose<'a> {
    site: &'a Site,
    dir: tempfile::TempDir,
    service: &'static str,
}

impl<'a> Compose<'a> {
    fn new(site: &'a Site, file: &str, service: &'static str, image: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("compose.yaml"), file)?;
        // No networks on the lab's engines; and busybox stands for the services' programs.
        let lab = format!(
            "services: {{ {service}: {{ network_mode: host, image: {image}, \
             command: [sleep, '1000'] }} }}\n"
        );
        fs::write(dir.path().join("lab.yaml"), lab)?;
        Ok(Self { site, dir, service })
    }

    fn run(&self, line: &str) -> Result<Output> {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let (file, lab) = (at("compose.yaml"), at("lab.yaml"));
        let mut args = vec!["docker-compose", "-p", "moving", "-f", &file, "-f", &lab];
        args.extend(line.split_whitespace());
        if line.starts_with("down") {
            // `sleep` does not end when it is asked to.
            args.extend(["-t", "0"]);
        }
        let mut task = Task::new(&args);
        let url = self.site.host.engine().url().to_owned();
        task.env.insert("DOCKER_HOST".to_owned(), url);
        task.run()
    }

    fn ok(&self, line: &str) -> Result<String> {
        self.run(line)?.ok()
    }

    fn sh(&self, script: &str) -> Result<String> {
        let id = self.ok(&format!("ps -q {}", self.service))?;
        self.site
            .host
            .engine()
            .ok(&["exec", &id, "sh", "-euc", script])
    }
}

fn compose(lab: &'static Lab) -> Result {
    let site = site(lab)?;
    let host = &site.host;

    // A file that makes its volume, twice: the data is there again.
    let database = Compose::new(
        site,
        include_str!("../docs/examples/compose.yaml"),
        "db",
        lab::docker::IMAGE,
    )?;
    database.ok("up -d")?;
    let owner = database.sh("cd /var/lib/postgresql/data; echo rows >table; stat -c %u:%g:%a .")?;
    ensure!(owner == "999:999:700", "{owner}");
    database.ok("down")?;
    database.ok("up -d")?;
    let read = database.sh("cat /var/lib/postgresql/data/table")?;
    ensure!(read == "rows", "{read}");
    // Its options are changed: docker-compose 1 asks for the volume's removal, Compose 2 removes it itself.
    database.ok("down")?;
    let file = include_str!("../docs/examples/compose.yaml").replace("exclusive", "shared");
    let shared = Compose::new(site, &file, "db", lab::docker::IMAGE)?;
    let refused = shared.run("up -d")?.fails()?;
    ensure!(
        refused.contains("please remove the existing volume"),
        "{refused}"
    );
    host.ok("volume rm db")?;
    shared.ok("up -d")?;
    let read = shared.sh("cd /var/lib/postgresql/data; cat table; stat -c %u:%g:%a .")?;
    ensure!(read == "rows\n999:999:700", "{read}");
    ensure!(host.inspect("db")?["Status"]["access"] == "shared");
    shared.ok("down -v")?;
    shared.ok("up -d")?;
    let read = shared.sh("ls /var/lib/postgresql/data")?;
    ensure!(read.is_empty(), "{read}");
    shared.ok("down -v")?;
    ensure!(
        host.volume("db")?
            .is_none_or(|volume| volume["Driver"] != "nfsvol")
    );

    // A file for the local driver moves by its `driver:` line.
    site.directory("files", "old")?;
    let ours = include_str!("../docs/examples/from-local.yaml")
        .replace("addr=nas", &format!("addr={}", site.nas.ip()))
        // The lab's machines have no NFSv4 client.
        .replace("nfsvers=4.1", "nfsvers=3")
        .replace(":/export/", &format!(":{EXPORT}/"));
    let local = ours.replace("driver: nfsvol ", "driver: local  ");
    ensure!(local != ours, "the example has another driver line");
    let before = Compose::new(site, &local, "app", lab::docker::IMAGE)?;
    before.ok("up --no-start")?;
    ensure!(host.inspect("files")?["Driver"] == "local");
    before.ok("down -v")?;
    let after = Compose::new(site, &ours, "app", lab::docker::IMAGE)?;
    after.ok("up -d")?;
    ensure!(host.inspect("files")?["Driver"] == "nfsvol");
    let read = after.sh("cat /files/file; echo new >/files/file")?;
    ensure!(read == "old", "{read}");
    after.ok("down -v")?;
    let left = fs::read_to_string(site.nas.local(EXPORT).join("files/file"))?;
    ensure!(left == "new\n", "{left}");

    // And after `nfsvol migrate`, by the commands that it shows.
    before.ok("up --no-start")?;
    before.ok("down")?;
    let (_, said) = site.json("migrate --yes files")?;
    for command in said[0]["next"].as_array().context("next")? {
        site.follow(command.as_str().unwrap_or_default())?;
    }
    after.ok("up -d")?;
    let read = after.sh("cat /files/file")?;
    ensure!(read == "new", "{read}");
    after.ok("down -v")?;
    ensure!(Path::new(&site.nas.local(EXPORT).join("files/file")).exists());
    Ok(())
}
