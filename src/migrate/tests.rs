use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::XattrFlags;
use tempfile::TempDir;

use super::copy::Copier;
use super::tree::{CopyError, measure};
use super::*;

/// The length of the sparse file, of which only a few blocks are written.
const SPARSE: u64 = 64 << 20;

struct Trees {
    from: TempDir,
    to: TempDir,
    stop: AtomicBool,
    done: AtomicU64,
}

impl Trees {
    fn new() -> Self {
        let trees = Self {
            from: tempfile::tempdir().unwrap(),
            to: tempfile::tempdir().unwrap(),
            stop: AtomicBool::new(false),
            done: AtomicU64::new(0),
        };
        let at = |path: &str| trees.from.path().join(path);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/file"), "contents").unwrap();
        fs::hard_link(at("a/file"), at("a/b/other-name")).unwrap();
        symlink("nowhere/../x", at("link")).unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.write_all_at(b"middle", SPARSE / 2).unwrap();
        sparse.set_len(SPARSE).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(at("pipe"))
                .status()
                .unwrap()
                .success()
        );
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::set_permissions(at("a/file"), PermissionsExt::from_mode(0o4751)).unwrap();
        fs::set_permissions(at("a/b"), PermissionsExt::from_mode(0o2770)).unwrap();
        for path in ["a/file", "a/b", "a", "pipe", "."] {
            let old = "2001-02-03 04:05:06.789";
            assert!(
                Command::new("touch")
                    .args(["-d", old])
                    .arg(at(path))
                    .status()
                    .unwrap()
                    .success()
            );
        }
        trees
    }

    fn copier<T>(&self, work: impl FnOnce(&Copier<'_>, &Path, &Path) -> T) -> T {
        let progress = |done| {
            self.done.fetch_add(done, Ordering::Relaxed);
        };
        let copier = Copier {
            progress: &progress,
            stop: &self.stop,
        };
        work(&copier, self.from.path(), self.to.path())
    }

    fn copy(&self) -> Result<Copied, CopyError> {
        self.copier(|copier, from, to| copier.copy(from, to))
    }

    fn verify(&self) -> Result<(), CopyError> {
        self.copier(|copier, from, to| copier.verify(from, to, true))
    }

    fn differs(&self) -> String {
        self.verify().unwrap_err().to_string()
    }
}

#[test]
fn a_copy_says_of_itself_what_its_source_says() {
    let trees = Trees::new();
    let xattr = rustix::fs::setxattr(
        trees.from.path().join("a/file"),
        "user.colour",
        b"green",
        XattrFlags::empty(),
    );
    let copied = trees.copy().unwrap();
    trees.verify().unwrap();
    assert_eq!((copied.found, copied.sockets, copied.links_left), (0, 1, 0));
    let (files, bytes) = measure(trees.from.path()).unwrap();
    assert_eq!(files, 6);
    // Copied, and compared.
    assert_eq!(trees.done.load(Ordering::Relaxed), 2 * bytes);

    let (from, to) = (trees.from.path(), trees.to.path());
    for path in ["a", "a/b", "a/file", "pipe", "sparse"] {
        let [source, copy] = [from, to].map(|root| fs::symlink_metadata(root.join(path)).unwrap());
        assert_eq!(source.mode(), copy.mode(), "{path}");
        assert_eq!(
            (source.uid(), source.gid()),
            (copy.uid(), copy.gid()),
            "{path}"
        );
        assert_eq!(
            source.modified().unwrap(),
            copy.modified().unwrap(),
            "{path}"
        );
    }
    assert_eq!(
        fs::read_link(to.join("link")).unwrap(),
        Path::new("nowhere/../x")
    );
    let ino = |path: &str| fs::metadata(to.join(path)).unwrap().ino();
    assert_eq!(ino("a/file"), ino("a/b/other-name"));
    let sparse = fs::metadata(to.join("sparse")).unwrap();
    assert_eq!(sparse.len(), SPARSE);
    assert!(
        sparse.blocks() * 512 < SPARSE / 4,
        "{} blocks",
        sparse.blocks()
    );
    assert!(!to.join("socket").exists());
    if xattr.is_ok() {
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(to.join("a/file"), "user.colour", &mut value).unwrap();
        assert_eq!(&value[..length], b"green");
    }
    let root = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(root(from), root(to));
}

#[test]
fn a_copy_that_was_interrupted_goes_on() {
    let trees = Trees::new();
    trees
        .copier(|copier, _, to| copier.begin(to, "db of here"))
        .unwrap();
    trees.stop.store(true, Ordering::Relaxed);
    assert!(matches!(trees.copy(), Err(CopyError::Interrupted)));
    trees.stop.store(false, Ordering::Relaxed);
    let all = trees.copy().unwrap();
    assert!(all.entries > 4, "{all:?}");

    // Killed in the middle of one file, with another one already copied.
    let to = trees.to.path();
    fs::rename(to.join("sparse"), to.join(".nfsvol-migrate.part")).unwrap();
    fs::write(to.join(".nfsvol-migrate.part"), "half").unwrap();
    trees
        .copier(|copier, _, to| copier.begin(to, "db of here"))
        .unwrap();
    let rest = trees.copy().unwrap();
    assert_eq!((rest.entries, rest.found), (1, all.entries - 1), "{rest:?}");
    trees.verify().unwrap();
    assert!(!to.join(".nfsvol-migrate.part").exists());

    trees
        .copier(|copier, from, to| copier.finish(from, to))
        .unwrap();
    assert_eq!(
        fs::read_dir(to).unwrap().count(),
        4,
        "nothing of ours inside"
    );
}

#[test]
fn a_volume_that_is_not_this_copys_is_left_alone() {
    let trees = Trees::new();
    let begin = |source: &str| trees.copier(|copier, _, to| copier.begin(to, source));
    fs::write(trees.to.path().join("mine"), "").unwrap();
    let refused = begin("db of here").unwrap_err().to_string();
    assert!(refused.contains("holds files already (mine)"), "{refused}");
    fs::remove_file(trees.to.path().join("mine")).unwrap();
    begin("db of here").unwrap();
    begin("db of here").unwrap();
    let refused = begin("db of there").unwrap_err().to_string();
    assert!(
        refused.contains("another copy") && refused.contains("db of here"),
        "{refused}"
    );
}

#[test]
fn every_difference_is_found() {
    let trees = Trees::new();
    trees.copy().unwrap();
    trees.verify().unwrap();
    let to = |path: &str| trees.to.path().join(path);

    // One byte, in a file of the same length and time.
    let time = fs::metadata(to("sparse")).unwrap().modified().unwrap();
    let file = File::options().write(true).open(to("sparse")).unwrap();
    file.write_all_at(b"x", SPARSE - 1).unwrap();
    file.set_modified(time).unwrap();
    assert!(
        trees
            .differs()
            .contains("sparse is not what it was copied from (other bytes)")
    );
    // Which a copy by size and time alone does not put right; the file has to go.
    fs::remove_file(to("sparse")).unwrap();
    assert!(trees.differs().contains("it is missing"));
    trees.copy().unwrap();
    trees.verify().unwrap();

    fs::set_permissions(to("a/b"), PermissionsExt::from_mode(0o700)).unwrap();
    assert!(
        trees
            .differs()
            .contains("a/b is not what it was copied from (another mode)")
    );
    trees.copy().unwrap();
    fs::write(to("a/more"), "").unwrap();
    assert!(trees.differs().contains("the source does not have it"));
    fs::remove_file(to("a/more")).unwrap();
    trees.copy().unwrap();
    fs::remove_file(to("link")).unwrap();
    symlink("elsewhere", to("link")).unwrap();
    let copied = trees.copy().unwrap();
    assert_eq!(copied.entries, 1, "{copied:?}");
    trees.verify().unwrap();
}

#[test]
fn only_containers_that_have_the_local_volume_use_it() {
    let containers = serde_json::json!([
        { "Id": "0123456789abcdef", "Names": ["/web"], "State": "running",
          "Mounts": [{ "Type": "volume", "Name": "db", "Driver": "local" }] },
        { "Id": "1123456789abcdef", "Names": ["/old"], "State": "exited",
          "Mounts": [{ "Type": "volume", "Name": "db", "Driver": "local" }] },
        { "Id": "2123456789abcdef", "Names": [], "State": "running",
          "Mounts": [{ "Type": "volume", "Name": "db", "Driver": "nfsvol" },
                     { "Type": "bind", "Source": "/db" }] },
    ]);
    let containers: Vec<Container> = serde_json::from_value(containers).unwrap();
    let users = users(&containers, "db");
    let shown: Vec<_> = users
        .iter()
        .map(|u| (u.container.as_str(), u.is_up))
        .collect();
    assert_eq!(shown, [("web", true), ("old", false)]);
}

#[test]
fn what_the_driver_mounts_for_a_volume_is_told() {
    let volume = |options: &[(&str, &str)]| LocalVolume {
        name: "films".to_owned(),
        options: options
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        mountpoint: "/var/lib/docker/volumes/films/_data".into(),
        users: Vec::new(),
    };
    for plain in [&[][..], &[("size", "10G")], &[("type", ""), ("o", "")]] {
        assert_eq!(volume(plain).mounts(), None);
    }
    let bind = [
        ("type", "none"),
        ("o", "ro, bind"),
        ("device", "/mnt/my media"),
    ];
    let said = volume(&bind).mounts().unwrap();
    assert!(
        said.starts_with("the directory /mnt/my media of this host"),
        "{said}"
    );
    for (kind, device) in [
        ("cifs", "//nas/films"),
        ("tmpfs", "tmpfs"),
        ("btrfs", "/dev/sdb"),
    ] {
        let said = volume(&[("type", kind), ("device", device)])
            .mounts()
            .unwrap();
        assert_eq!(said, format!("{device} with type={kind}"));
    }
}
