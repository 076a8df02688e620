//! What a tutorial on Docker volumes teaches, by the docker command line.
//!
//! One set of scenarios; each is a trial on every [`Way`] that a volume's bytes can travel, where
//! all scenarios share one host.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use lab::ganesha::LONG_LEASE;
use lab::{
    Call, DataPath, Export, Ganesha, Host, Knfsd, Lab, PATIENCE, Part, Result, Shared, calls,
    trial, wait_for,
};
use serde_json::{Value, json};

/// A host whose home share is on one kind of server.
struct Way {
    name: &'static str,
    needs: &'static [Part],
    host: fn(&'static Lab) -> Result<&'static Host>,
}

const WAYS: [Way; 4] = [
    Way {
        name: "fuse_ganesha",
        needs: &[Part::Docker, Part::Ganesha, Part::Fuse],
        host: |lab| {
            static HOST: Shared<Host> = Shared::new();
            let share = ganesha(lab)?.share("/srv/fuse");
            HOST.get(|| Host::start(lab, "machine", DataPath::Fuse, &share))
        },
    },
    Way {
        name: "kernel_ganesha",
        needs: &[Part::Docker, Part::Ganesha, Part::Guest],
        host: |lab| {
            static HOST: Shared<Host> = Shared::new();
            let share = ganesha(lab)?.share("/srv/kernel");
            HOST.get(|| Host::start(lab, "guest", DataPath::Kernel, &share))
        },
    },
    Way {
        name: "kernel_knfsd",
        needs: &[Part::Docker, Part::Knfsd, Part::Guest],
        host: |lab| {
            static HOST: Shared<Host> = Shared::new();
            let share = knfsd(lab)?.share();
            HOST.get(|| Host::start_newer(lab, "other-guest", &share))
        },
    },
    Way {
        name: "fuse_knfsd",
        needs: &[Part::Docker, Part::Knfsd, Part::Guest, Part::Fuse],
        host: |lab| {
            static HOST: Shared<Host> = Shared::new();
            let share = format!("{}/fuse", knfsd(lab)?.share());
            HOST.get(|| Host::start(lab, "other-machine", DataPath::Fuse, &share))
        },
    },
];

/// A name, and what is done on a host with volumes, containers and images that no other has.
type Scenario = (&'static str, fn(&Host) -> Result);

const SCENARIOS: [Scenario; 15] = [
    ("named", named),
    ("options_and_labels", options_and_labels),
    ("changed_options", changed_options),
    ("refused_options", refused_options),
    ("local_form", local_form),
    ("anonymous", anonymous),
    ("image_data", image_data),
    ("new_image_version", new_image_version),
    ("host_side", host_side),
    ("two_containers", two_containers),
    ("volumes_from", volumes_from),
    ("read_only", read_only),
    ("in_use", in_use),
    ("prune", prune),
    ("docker_cp", docker_cp),
];

fn main() -> ExitCode {
    lab::main!(|| {
        let each = SCENARIOS
            .iter()
            .flat_map(|scenario| WAYS.iter().map(move |way| (way, scenario)));
        each.map(|(way, &(name, scenario))| {
            let name = format!("{}::{name}", way.name);
            trial(name, way.needs, move |lab| scenario((way.host)(lab)?))
        })
        .collect()
    })
}

fn ganesha(lab: &'static Lab) -> Result<&'static Ganesha> {
    static SERVER: Shared<Ganesha> = Shared::new();
    let exports = ["/srv/fuse", "/srv/kernel"].map(Export::new);
    SERVER.get(|| Ganesha::start_leasing(lab, "nas", &exports, LONG_LEASE))
}

fn knfsd(lab: &'static Lab) -> Result<&'static Knfsd> {
    static SERVER: Shared<Knfsd> = Shared::new();
    SERVER.get(|| {
        let server = Knfsd::start(lab, "knfsd", "512M")?;
        server
            .node()
            .sh(&format!("mkdir -p {}/fuse", server.local()))?;
        Ok(server)
    })
}

fn named(host: &Host) -> Result {
    ensure!(host.ok("volume create -d nfsvol named")? == "named");
    // Again: nothing changes, and it is no error.
    ensure!(host.ok("volume create -d nfsvol named")? == "named");
    ensure!(host.lists("named")?);
    let volume = host.inspect("named")?;
    ensure!(
        volume["Driver"] == "nfsvol" && volume["Scope"] == "global",
        "{volume}"
    );
    ensure!(volume["Status"]["data_dir"] == "named", "{volume}");
    ensure!(host.ok("volume rm named")? == "named");
    ensure!(!host.lists("named")? && host.volume("named")?.is_none());
    // The name is free at once.
    host.ok("volume create -d nfsvol named")?;
    host.ok("volume rm named")?;
    Ok(())
}

fn options_and_labels(host: &Host) -> Result {
    let create = "volume create -d nfsvol";
    host.ok(&format!(
        "{create} -o uid=1000 -o gid=100 -o mode=2750 --label team=red optioned"
    ))?;
    let given = json!({ "uid": "1000", "gid": "100", "mode": "2750" });
    let volume = host.inspect("optioned")?;
    ensure!(volume["Options"] == given, "{volume}");
    ensure!(volume["Labels"] == json!({ "team": "red" }), "{volume}");
    ensure!(volume["Status"]["options"] == given, "{volume}");
    let found = host.ok("volume ls --quiet --filter label=team=red")?;
    ensure!(found == "optioned", "{found}");
    let attributes = host.run("-v optioned:/data", "stat -c %u:%g:%a /data")?;
    ensure!(attributes == "1000:100:2750", "{attributes}");
    // Docker does not tell the driver of other options for a name it knows: they have no effect.
    host.ok(&format!("{create} -o uid=1 optioned"))?;
    ensure!(host.inspect("optioned")?["Options"] == given);
    Ok(())
}

/// The two calls by which Compose changes a volume's options, with its labels.
fn changed_options(host: &Host) -> Result {
    let create = "volume create -d nfsvol --label com.docker.compose.project=shop";
    host.ok(&format!("{create} -o mode=0750 changed"))?;
    host.run("-v changed:/data", "echo data >/data/file")?;
    host.ok("volume rm changed")?;
    let given = json!({ "mode": "0700", "uid": "7" });
    let changed = format!("{create} --label new=1 -o mode=0700 -o uid=7 changed");
    host.ok(&changed)?;
    let volume = host.inspect("changed")?;
    ensure!(volume["Options"] == given, "{volume}");
    ensure!(volume["Labels"]["new"] == "1", "{volume}");
    ensure!(volume["Status"]["options"] == given, "{volume}");
    let said = volume["Status"]["restored"].as_str().unwrap_or_default();
    ensure!(said.contains("its options changed"), "{volume}");
    let read = host.run("-v changed:/data", "cat /data/file; stat -c %u:%a /data")?;
    ensure!(read == "data\n0:750", "{read}");
    // `down -v` and `up`: nothing has changed.
    host.ok("volume rm changed")?;
    host.ok(&changed)?;
    let volume = host.inspect("changed")?;
    ensure!(volume["Status"]["restored"].is_null(), "{volume}");
    let read = host.run("-v changed:/data", "ls /data; stat -c %u:%a /data")?;
    ensure!(read == "7:700", "{read}");
    Ok(())
}

fn refused_options(host: &Host) -> Result {
    for (option, said) in [
        ("sahre=nas:/x", "did you mean \"share\"?"),
        ("access=shard", "did you mean \"shared\"?"),
        ("mode=rwx", "mode=\"rwx\""),
        ("subdir=../other", "subdir=\"../other\""),
        ("type=cifs", "type=\"cifs\": expected nfs or nfs4"),
    ] {
        let error = host.fails(&format!("volume create -d nfsvol -o {option} refused"))?;
        ensure!(error.contains(said), "{said}: {error}");
    }
    ensure!(!host.lists("refused")? && host.volume("refused")?.is_none());
    Ok(())
}

/// What a Compose file gives the `local` driver: the directory is there, and stays.
fn local_form(host: &Host) -> Result {
    host.ok("volume create -d nfsvol -o subdir=compose/db plain")?;
    let volume = host.inspect("plain")?;
    let share = volume["Status"]["share"].as_str().unwrap_or_default();
    let (server, export) = share.split_once(':').context("the share")?;
    host.ok(&format!(
        "volume create -d nfsvol -o type=nfs -o o=addr={server},rw,nfsvers=3 \
         -o device=:{export}/compose/db moved"
    ))?;
    let script = "echo data >/plain/file; cat /moved/file";
    let read = host.run("-v plain:/plain -v moved:/moved", script)?;
    ensure!(read == "data", "{read}");
    host.ok("volume rm moved")?;
    let read = host.run("-v plain:/plain", "cat /plain/file")?;
    ensure!(read == "data", "{read}");
    Ok(())
}

fn anonymous(host: &Host) -> Result {
    host.ok("volume create -d nfsvol not-anonymous")?;
    let options = "-v /data -v not-anonymous:/named";
    let name_of = |container: &str| -> Result<String> {
        let mounts = host.mounts(container)?;
        let at_data = |mount: &&Value| mount["Destination"] == "/data";
        let mount = mounts.as_array().and_then(|all| all.iter().find(at_data));
        let mount = mount.with_context(|| mounts.to_string())?;
        ensure!(mount["Driver"] == "nfsvol", "{mounts}");
        Ok(mount["Name"].as_str().unwrap_or_default().to_owned())
    };
    // Removing a container leaves the volume,
    host.keep("anonymous-1", options)?;
    let left = name_of("anonymous-1")?;
    ensure!(left.len() == 64, "{left}");
    host.ok("rm -f anonymous-1")?;
    ensure!(host.lists(&left)?);
    host.ok(&format!("volume rm {left}"))?;
    // with `-v` it goes too,
    host.keep("anonymous-2", options)?;
    let gone = name_of("anonymous-2")?;
    ensure!(host.lists(&gone)?);
    host.ok("rm -f -v anonymous-2")?;
    ensure!(!host.lists(&gone)?);
    // and with `--rm`, when the container ends.
    host.keep("anonymous-3", &format!("--rm {options}"))?;
    let gone = name_of("anonymous-3")?;
    ensure!(host.lists(&gone)?);
    host.ok("kill anonymous-3")?;
    wait_for("the volume to go", PATIENCE, || {
        host.lists(&gone).is_ok_and(|listed| !listed)
    })?;
    ensure!(host.lists("not-anonymous")?);
    Ok(())
}

fn image_data(host: &Host) -> Result {
    host.engine().image(
        "filled",
        "mkdir data data/sub other; echo page >data/file; ln -s file data/link; touch other/more
         chown 9:10 data; chmod 0711 data; chown 7:8 data/sub; chmod 1770 data/sub
         chown 1234:55 data/file; chmod 0640 data/file",
        &["CMD [\"true\"]"],
    )?;
    // It happens when a container is made: the first time, and not to a volume with data.
    let create = "create --volume-driver nfsvol";
    host.ok(&format!("{create} --name filled-1 -v filled:/data filled"))?;
    host.ok(&format!("{create} --name filled-2 -v filled:/other filled"))?;
    host.ok(&format!(
        "{create} --name filled-3 -v bare:/data:nocopy filled"
    ))?;
    let seen = host.run(
        "-v filled:/filled -v bare:/bare",
        "cd /filled; stat -c '%n %u:%g %a' . file sub; readlink link; cat file
         ls -A; ls -A /bare",
    )?;
    let expected = ". 9:10 711\nfile 1234:55 640\nsub 7:8 1770\nfile\npage\nfile\nlink\nsub";
    ensure!(seen == expected, "{seen}");
    host.ok("rm filled-1 filled-2 filled-3")?;
    Ok(())
}

fn new_image_version(host: &Host) -> Result {
    let run = |version: &str| {
        host.ok(&format!(
            "run --name app --network=host --volume-driver nfsvol -v site:/site app:{version}"
        ))
    };
    for version in ["1", "2"] {
        let cmd = format!("echo {version} >>/site/visits; cat /site/page /site/visits");
        host.engine().image(
            &format!("app:{version}"),
            &format!("mkdir site; echo page of {version} >site/page"),
            &[&format!("CMD [\"sh\", \"-c\", \"{cmd}\"]")],
        )?;
    }
    let said = run("1")?;
    ensure!(said == "page of 1\n1", "{said}");
    host.ok("rm app")?;
    host.ok("rmi app:1")?;
    let said = run("2")?;
    ensure!(said == "page of 1\n1\n2", "{said}");
    host.ok("rm app")?;
    Ok(())
}

fn host_side(host: &Host) -> Result {
    host.ok("volume create -d nfsvol edited")?;
    let mountpoint = host.inspect("edited")?["Mountpoint"].clone();
    let place = mountpoint.as_str().context("no mount point")?;
    host.keep("edited", "-v edited:/data")?;
    let mounts = host.mounts("edited")?;
    let mount = &mounts[0];
    for (key, value) in [
        ("Type", "volume"),
        ("Name", "edited"),
        ("Driver", "nfsvol"),
        ("Source", place),
        ("Destination", "/data"),
    ] {
        ensure!(mount[key] == value, "{key}: {mounts}");
    }
    ensure!(mount["RW"] == true, "{mounts}");
    let inside = |script: &str| host.engine().ok(&["exec", "edited", "sh", "-euc", script]);
    inside("echo inside >/data/file; chown 5:6 /data/file")?;
    let seen = host.node().sh(&format!(
        "cd {place}; cat file; stat -c %u:%g file; echo outside >>file; mv file renamed"
    ))?;
    ensure!(seen == "inside\n5:6", "{seen}");
    let seen = inside("cat /data/renamed; ls /data")?;
    ensure!(seen == "inside\noutside\nrenamed", "{seen}");
    host.ok("rm -f edited")?;
    // The path stays; nothing is there without a container.
    ensure!(host.inspect("edited")?["Mountpoint"] == mountpoint);
    host.node().sh(&format!("! test -e {place}"))?;
    Ok(())
}

fn two_containers(host: &Host) -> Result {
    let first = "until [ -e /data/question ]; do sleep 0.1; done
                 cat /data/question >/data/.new; echo answer >>/data/.new
                 mv /data/.new /data/answer; exec sleep 3600";
    host.try_run("-d --name=first -v pair:/data", first)?.ok()?;
    let heard = host.run(
        "-v pair:/data",
        "echo question >/data/.question; mv /data/.question /data/question
         until [ -e /data/answer ]; do sleep 0.1; done; cat /data/answer",
    )?;
    ensure!(heard == "question\nanswer", "{heard}");
    // The second has gone; the first keeps its volume.
    let seen = host.ok("exec first cat /data/answer")?;
    ensure!(seen == heard, "{seen}");
    host.ok("rm -f first")?;
    Ok(())
}

fn volumes_from(host: &Host) -> Result {
    host.keep("runs", "-v from-running:/one")?;
    host.ok(
        "create --name created --network=host --volume-driver nfsvol -v from-created:/two \
         busybox cat /two/file",
    )?;
    host.run(
        "--volumes-from=runs --volumes-from=created",
        "echo one >/one/file; echo two >/two/file",
    )?;
    ensure!(host.ok("exec runs cat /one/file")? == "one");
    ensure!(host.ok("start --attach created")? == "two");
    let refused = host.try_run("--rm --volumes-from=runs:ro", "cat /one/file; rm /one/file")?;
    ensure!(refused.stdout == "one\n", "{refused}");
    ensure!(refused.fails()?.contains("Read-only file system"));
    host.ok("rm -f runs created")?;
    Ok(())
}

fn read_only(host: &Host) -> Result {
    host.run("-v sealed:/data", "echo kept >/data/file")?;
    let script = "cat /data/file; for do in 'rm /data/file' 'touch /data/new' \
                  'sh -c \"echo x >>/data/file\"'; do eval $do || true; done; ls /data";
    let output = host.try_run("--name=reader -v sealed:/data:ro", script)?;
    ensure!(output.stdout == "kept\nfile\n", "{output}");
    let refusals = output.stderr.matches("Read-only file system").count();
    ensure!(refusals == 3, "{output}");
    ensure!(host.mounts("reader")?[0]["RW"] == false);
    host.ok("rm reader")?;
    Ok(())
}

fn in_use(host: &Host) -> Result {
    host.keep("user", "-v used:/data")?;
    let id = host.ok("ps --quiet --filter name=user")?;
    for command in ["volume rm used", "volume rm -f used"] {
        let error = host.fails(command)?;
        ensure!(
            error.contains("volume is in use") && error.contains(&id),
            "{error}"
        );
    }
    // An engine that knows nothing of the container hears it from nfsvol.
    let error = calls::one(host.node(), Call::remove("used"))?.fails()?;
    let said = format!("volume used is in use by container {id}; stop that first");
    ensure!(error == said, "{error}");
    // A stopped container may be started again.
    host.ok("kill user")?;
    ensure!(host.fails("volume rm used")?.contains("volume is in use"));
    host.ok("rm user")?;
    host.ok("volume rm used")?;
    Ok(())
}

fn prune(host: &Host) -> Result {
    host.run("-v pruned:/data", "echo kept >/data/file")?;
    let removed = host.ok("volume prune --force")?;
    ensure!(!removed.contains("pruned"), "{removed}");
    ensure!(host.lists("pruned")?);
    let read = host.run("-v pruned:/data", "cat /data/file")?;
    ensure!(read == "kept", "{read}");
    Ok(())
}

fn docker_cp(host: &Host) -> Result {
    host.keep("copier", "-v copied:/data")?;
    let file = host.node().dir().join("copied");
    let local = file.to_str().context("the lab's path is not UTF-8")?;
    fs::write(&file, "from outside\n")?;
    host.ok(&format!("cp {local} copier:/data/file"))?;
    // The engine mounts and unmounts with the container's own ID for this: it keeps its volume.
    host.engine()
        .ok(&["exec", "copier", "sh", "-euc", "echo inside >>/data/file"])?;
    fs::remove_file(&file)?;
    host.ok(&format!("cp copier:/data/file {local}"))?;
    let copied = fs::read_to_string(&file)?;
    ensure!(copied == "from outside\ninside\n", "{copied}");
    let volume = host.inspect("copied")?;
    let attachments = volume["Status"]["attachments"].as_array();
    ensure!(attachments.is_some_and(|all| all.len() == 1), "{volume}");
    let error = calls::one(host.node(), Call::remove("copied"))?.fails()?;
    ensure!(error.contains("in use by container"), "{error}");
    host.ok("rm -f copier")?;
    ensure!(host.inspect("copied")?["Status"]["attachments"].is_null());
    Ok(())
}
