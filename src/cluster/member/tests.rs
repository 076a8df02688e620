use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::AtomicU64;

use super::*;
use crate::cluster::hold::{FORMAT, json};
use crate::cluster::{Beat, Claimed, Entry};
use crate::layout;
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminSettings};

const SESSION: Duration = Duration::from_secs(30);

/// A clock that stands still until it is set.
#[derive(Clone, Default)]
struct Clock(Arc<(AtomicU64, AtomicU64)>);

impl Clock {
    fn pass(&self, secs: u64) {
        self.0.0.fetch_add(secs, Ordering::Relaxed);
    }
}

impl Env for Clock {
    fn now(&self) -> Duration {
        Duration::from_secs(1000 + self.0.0.load(Ordering::Relaxed))
    }

    fn nonce(&self) -> String {
        format!("{:016x}", self.0.1.fetch_add(1, Ordering::Relaxed))
    }
}

/// A home share in a directory, with one volume.
struct Home {
    dir: tempfile::TempDir,
    admin: Admin,
    clock: Clock,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for made in ["hosts", "tmp", "volumes/db"] {
            fs::create_dir_all(dir.path().join(".nfsvol").join(made)).unwrap();
        }
        fs::write(dir.path().join(".nfsvol/format.json"), "{}").unwrap();
        let share = "nas:/export".parse().unwrap();
        let admin = Admin::mounted(share, dir.path().to_owned(), AdminSettings::default());
        let clock = Clock::default();
        Self { dir, admin, clock }
    }

    fn member(&self, name: &str) -> Member<Clock> {
        let host = Host {
            name: name.to_owned(),
            id: format!("id of {name}"),
            boot: "boot".to_owned(),
        };
        Member::new(host, Times::new(SESSION), self.clock.clone(), [])
    }

    /// The share for one who is slow, as soon as it is told by what.
    fn slow(&self) -> Slow<'_> {
        Slow {
            admin: &self.admin,
            clock: self.clock.clone(),
            target: SharePath::root(),
            meanwhile: Mutex::new(None),
            stuck: false,
        }
    }

    /// The server forgets a host's last renewals.
    fn forget_renewals(&self, host: &str, number: u64) {
        let name = self.token(host);
        let mut token = layout::Token::parse(&name).unwrap();
        token.number -= number;
        let dir = self.path("hosts").join(host);
        fs::rename(dir.join(name), dir.join(token.name())).unwrap();
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(".nfsvol").join(path)
    }

    fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn token(&self, host: &str) -> String {
        let names = self.names(&format!("hosts/{host}"));
        assert_eq!(names.len(), 1, "{names:?}");
        names[0].clone()
    }

    fn last_document(&self, host: &str) -> PathBuf {
        let names = self.names("hosts");
        let documents = names.iter().filter_map(|name| layout::parse_document(name));
        let number = documents
            .filter(|(of, _)| *of == host)
            .map(|(_, n)| n)
            .max();
        self.path(&format!("hosts/{host}.{}.json", number.unwrap()))
    }
}

fn db() -> VolumeName {
    "db".parse().unwrap()
}

async fn begun(home: &Home, name: &str) -> Member<Clock> {
    let member = home.member(name);
    member.beat(&home.admin).await.unwrap();
    assert_eq!(member.beat(&home.admin).await.unwrap(), Beat::Renewed);
    assert!(member.has_right());
    member
}

async fn mine(home: &Home, member: &Member<Clock>) -> bool {
    let claimed = member.claim(&home.admin, &db(), "1").await;
    matches!(claimed.unwrap(), Claimed::Mine(_))
}

/// The server's power fails, and it comes back with the token as it was some renewals ago.
async fn goes_on_behind(home: &Home, member: &Member<Clock>) -> Result<(), String> {
    home.forget_renewals("a", 1);
    home.clock.pass(5);
    let beat = member.beat(&home.admin).await;
    let beat = beat.map_err(|error| error.to_string())?;
    let left = member.right_until().saturating_sub(home.clock.now());
    if beat != Beat::Renewed || left != SESSION / 2 {
        return Err(format!("{beat:?}, {left:?}"));
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_stands_behind_is_gone_on_from() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    for _ in 0..3 {
        member.beat(&home.admin).await.unwrap();
    }
    goes_on_behind(&home, &member).await.unwrap();
    let _back = mutant::put_back(Mutant::TokenBehindIsAnError);
    goes_on_behind(&home, &member).await.unwrap_err();
}

/// The server forgets the document and the claim of a host that uses an exclusive volume: whether
/// another host can have the volume.
async fn is_taken_after_forgetting(home: &Home) -> bool {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    assert!(mine(home, &a).await);
    a.beat(&home.admin).await.unwrap();
    let told = home.last_document("a");
    fs::remove_file(told).unwrap();
    fs::remove_dir_all(home.path("volumes/db/claims.1")).unwrap();
    // The renewal after the gap tells of it.
    a.unsure.raise();
    a.beat(&home.admin).await.unwrap();
    let taken = mine(home, &b).await;
    assert!(a.held().contains_key(&db()));
    taken
}

#[tokio::test]
async fn what_a_server_forgot_is_put_there_again() {
    let home = Home::new();
    assert!(!is_taken_after_forgetting(&home).await);
    assert_eq!(home.names("volumes/db/claims.1"), ["1"]);
    let home = Home::new();
    let _back = mutant::put_back(Mutant::ForgottenStaysForgotten);
    assert!(is_taken_after_forgetting(&home).await);
}

#[tokio::test]
async fn a_host_whose_claim_was_forgotten_and_taken_gives_the_volume_up() {
    let home = Home::new();
    let (a, b) = (begun(&home, "a").await, begun(&home, "b").await);
    assert!(mine(&home, &a).await);
    fs::remove_dir_all(home.path("volumes/db/claims.1")).unwrap();
    fs::remove_file(home.last_document("a")).unwrap();
    assert!(mine(&home, &b).await);
    a.unsure.raise();
    assert_eq!(a.beat(&home.admin).await.unwrap(), Beat::Lost(vec![db()]));
    assert!(a.held().is_empty());
    assert!(mine(&home, &b).await, "its claim is good");
}

/// The server exports an empty directory for a while: what became of the session.
async fn after_an_empty_export(home: &Home, member: &Member<Clock>) -> Beat {
    let (own, aside) = (home.path(""), home.dir.path().join("aside"));
    fs::rename(&own, &aside).unwrap();
    home.clock.pass(5);
    let beat = member.beat(&home.admin).await;
    let held = member.holdings(&home.admin, &db()).await;
    fs::rename(&aside, &own).unwrap();
    if let Ok(beat) = beat {
        return beat;
    }
    assert!(held.is_err(), "{held:?}");
    assert!(member.has_right());
    member.beat(&home.admin).await.unwrap()
}

#[tokio::test]
async fn an_empty_export_ends_nothing() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    assert!(mine(&home, &member).await);
    assert_eq!(after_an_empty_export(&home, &member).await, Beat::Renewed);
    assert!(member.held().contains_key(&db()));
    let back = mutant::put_back(Mutant::AbsenceEndsSessions);
    assert_eq!(
        after_an_empty_export(&home, &member).await,
        Beat::Lost(vec![db()])
    );
    drop(back);
}

#[tokio::test]
async fn a_session_without_its_token_goes_on() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    let before = home.token("a");
    fs::remove_file(home.path("hosts/a").join(&before)).unwrap();
    home.clock.pass(5);
    assert_eq!(
        member.beat(&home.admin).await.unwrap_err().to_string(),
        MemberError::Elsewhere.to_string()
    );
    assert_eq!(member.beat(&home.admin).await.unwrap(), Beat::Renewed);
    let (before, now) = (
        layout::Token::parse(&before),
        layout::Token::parse(&home.token("a")),
    );
    assert_eq!(before.unwrap().session, now.unwrap().session);
}

#[tokio::test]
async fn a_torn_document_of_ones_own_is_written_anew() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    assert!(mine(&home, &member).await);
    fs::write(home.last_document("a"), "").unwrap();
    {
        let _back = mutant::put_back(Mutant::TornFilesStay);
        let again = home.member("a");
        let error = again.beat(&home.admin).await.unwrap_err();
        assert!(matches!(error, MemberError::Unreadable(_)), "{error}");
    }
    // After a restart of the daemon as well; the one before it is whole, and says the session.
    let again = begun(&home, "a").await;
    assert!(again.has_right());
    let doc: HostDoc = serde_json::from_slice(&fs::read(home.last_document("a")).unwrap()).unwrap();
    assert_eq!(doc.id, "id of a");
}

#[tokio::test]
async fn a_torn_document_of_a_dead_host_is_void_after_its_session() {
    let home = Home::new();
    let b = begun(&home, "b").await;
    let a = begun(&home, "a").await;
    a.hold(&home.admin, &db(), Access::Shared).await.unwrap();
    fs::write(home.last_document("a"), "").unwrap();
    let unknown = b.holdings(&home.admin, &db()).await.unwrap_err();
    assert!(matches!(unknown, MemberError::Unreadable(host) if host == "a"));
    // The times of files go by the machine's clock, which stands still beside this one.
    let store = home.slow();
    for _ in 0..5 {
        home.clock.pass(5);
        b.renew(&store).await.unwrap();
    }
    home.clock.pass(5);
    {
        let _back = mutant::put_back(Mutant::TornFilesStay);
        b.holdings(&store, &db()).await.unwrap_err();
    }
    assert_eq!(b.holdings(&store, &db()).await.unwrap(), []);
    assert!(home.token("a").starts_with("ended."));
    // It was only stopped: it begins anew.
    assert_eq!(a.beat(&home.admin).await.unwrap(), Beat::Began);
}

#[tokio::test]
async fn a_torn_claim_is_its_holders_or_nobodys() {
    let home = Home::new();
    let (a, b) = (begun(&home, "a").await, begun(&home, "b").await);
    assert!(mine(&home, &a).await);
    let file = home.path("volumes/db/claims.1/1/claim.json");
    fs::write(&file, "").unwrap();
    assert!(!mine(&home, &b).await, "the one who has it lives");
    assert!(mine(&home, &a).await);
    assert!(!fs::read(&file).unwrap().is_empty(), "written anew");
    fs::write(&file, "").unwrap();
    a.release(&home.admin, &[db()]).await;
    {
        let _back = mutant::put_back(Mutant::TornFilesStay);
        b.claim(&home.admin, &db(), "1").await.unwrap_err();
    }
    assert!(mine(&home, &b).await);
    assert_eq!(home.names("volumes/db/claims.1"), ["2"]);
    // The file may be lost, and its directory not.
    let file = home.path("volumes/db/claims.1/2/claim.json");
    fs::remove_file(&file).unwrap();
    {
        let _back = mutant::put_back(Mutant::ClaimsWithoutFileStay);
        a.claim(&home.admin, &db(), "1").await.unwrap_err();
    }
    assert!(!mine(&home, &a).await, "the one who has it lives");
    assert!(mine(&home, &b).await);
    assert!(file.exists(), "written anew");
    fs::remove_file(&file).unwrap();
    b.release(&home.admin, &[db()]).await;
    assert!(mine(&home, &a).await);
}

/// A session that begins while `format.json` is torn, and goes on when it has been put back.
async fn begins_on_a_torn_share() -> bool {
    let home = Home::new();
    let file = home.path("format.json");
    fs::write(&file, "\0\0").unwrap();
    let a = home.member("a");
    let _ = a.beat(&home.admin).await;
    fs::write(&file, "{}").unwrap();
    // As after any gap.
    a.unsure.raise();
    let _ = a.beat(&home.admin).await;
    a.claim(&home.admin, &db(), "1").await.is_ok()
}

#[tokio::test]
async fn no_session_begins_on_a_share_whose_format_file_is_torn() {
    assert!(begins_on_a_torn_share().await);
    let _back = mutant::put_back(Mutant::TornFormatIsOne);
    assert!(!begins_on_a_torn_share().await);
}

/// The server forgets the documents of a host's process, and the next one holds what that did not:
/// whether another host sees it.
async fn is_seen_after_a_restart(home: &Home) -> bool {
    let b = begun(home, "b").await;
    begun(home, "a").await;
    let before = home.names("hosts");
    begun(home, "a").await;
    b.look(&home.admin).await.unwrap();
    for document in home.names("hosts").iter().filter(|d| d.starts_with("a.")) {
        if !before.contains(document) {
            fs::remove_file(home.path("hosts").join(document)).unwrap();
        }
    }
    let host = home.member("a").host().clone();
    let using = [(db(), Access::Shared)];
    let a = Member::new(host, Times::new(SESSION), home.clock.clone(), using);
    a.beat(&home.admin).await.unwrap();
    !b.holdings(&home.admin, &db()).await.unwrap().is_empty()
}

#[tokio::test]
async fn a_documents_number_does_not_come_again() {
    assert!(is_seen_after_a_restart(&Home::new()).await);
    let _back = mutant::put_back(Mutant::DocumentNumbersComeAgain);
    assert!(!is_seen_after_a_restart(&Home::new()).await);
}

/// The share as one host sees it: something happens just before it renames to a target, or writes a
/// file into it, and the server's clock goes with the hosts'.
struct Slow<'a> {
    admin: &'a Admin,
    clock: Clock,
    target: SharePath,
    meanwhile: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send + 'a>>>>,
    /// What is not for renewals alone gets no answer any more.
    stuck: bool,
}

impl Slow<'_> {
    async fn before(&self, target: &SharePath) {
        if *target == self.target
            && let Some(meanwhile) = self.meanwhile.lock().await.take()
        {
            meanwhile.await;
        }
    }
}

impl Store for Slow<'_> {
    fn for_renewals(&self, _: Duration) -> impl Store {
        Slow {
            admin: self.admin,
            clock: self.clock.clone(),
            target: SharePath::root(),
            meanwhile: Mutex::new(None),
            stuck: false,
        }
    }

    async fn list(&self, dir: &SharePath) -> Result<Option<Vec<Entry>>, AdminError> {
        Store::list(self.admin, dir).await
    }

    async fn mtime(&self, path: &SharePath) -> Result<Option<Stamp>, AdminError> {
        self.admin.mtime(path).await
    }

    async fn read(&self, file: &SharePath) -> Result<Option<Vec<u8>>, AdminError> {
        Store::read(self.admin, file).await
    }

    async fn put(&self, file: &SharePath, contents: &[u8]) -> Result<(), AdminError> {
        self.before(&file.parent()).await;
        self.admin.put(file, contents).await
    }

    async fn create(&self, file: &SharePath, contents: &[u8]) -> Result<(), AdminError> {
        self.before(&file.parent()).await;
        self.admin.create(file, contents).await
    }

    async fn make_dir(&self, dir: &SharePath) -> Result<(), AdminError> {
        self.admin.make_dir(dir).await
    }

    async fn rename(&self, from: &SharePath, to: &SharePath) -> Result<(), AdminError> {
        self.before(to).await;
        Store::rename(self.admin, from, to).await
    }

    async fn rename_within(
        &self,
        dir: &SharePath,
        from: &str,
        to: &str,
    ) -> Result<Stamp, AdminError> {
        if self.stuck {
            std::future::pending::<()>().await;
        }
        let mut stamp = Store::rename_within(self.admin, dir, from, to).await?;
        stamp.secs += self.clock.0.0.load(Ordering::Relaxed);
        Ok(stamp)
    }

    async fn remove(&self, path: &SharePath) -> Result<(), AdminError> {
        self.admin.remove(path).await
    }
}

/// Two whole cycles of another host pass while a host is about to make an epoch: who has it.
async fn claims_beside_a_slow_host(home: &Home) -> [bool; 2] {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    let meanwhile = Box::pin(async {
        assert!(mine(home, &b).await);
        b.release(&home.admin, &[db()]).await;
        assert!(mine(home, &b).await);
    });
    let slow = Slow {
        target: layout::claims(&db(), "1").join("1"),
        meanwhile: Mutex::new(Some(meanwhile)),
        ..home.slow()
    };
    let first = a.claim(&slow, &db(), "1").await.unwrap();
    [matches!(first, Claimed::Mine(_)), mine(home, &b).await]
}

#[tokio::test]
async fn an_epoch_that_is_made_anew_wins_nothing() {
    assert_eq!(claims_beside_a_slow_host(&Home::new()).await, [false, true]);
    let _back = mutant::put_back(Mutant::EpochMadeAnewWins);
    assert_eq!(claims_beside_a_slow_host(&Home::new()).await, [true, true]);
}

/// The server has lost the file of a host's claim, then forgets its epoch, and another host makes that anew
/// just before the first one puts its own claim there again: whether each believes that it has the volume.
async fn claims_where_it_was_forgotten(home: &Home) -> [bool; 2] {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    assert!(mine(home, &a).await);
    let epoch = home.path("volumes/db/claims.1/1");
    fs::remove_file(epoch.join("claim.json")).unwrap();
    let meanwhile = Box::pin(async {
        fs::remove_dir(&epoch).unwrap();
        assert!(mine(home, &b).await);
    });
    let slow = Slow {
        target: layout::claims(&db(), "1").join("1"),
        meanwhile: Mutex::new(Some(meanwhile)),
        ..home.slow()
    };
    let again = a.claim(&slow, &db(), "1").await.unwrap();
    assert!(slow.meanwhile.lock().await.is_none(), "it came between");
    [matches!(again, Claimed::Mine(_)), mine(home, &b).await]
}

#[tokio::test]
async fn no_claim_is_put_over_another_hosts() {
    let one = [false, true];
    assert_eq!(claims_where_it_was_forgotten(&Home::new()).await, one);
    let _back = mutant::put_back(Mutant::OwnClaimReplaces);
    let taken = [true, false];
    assert_eq!(claims_where_it_was_forgotten(&Home::new()).await, taken);
}

/// Whether a renewal goes by a claim that waits for the share.
async fn renews_beside_a_claim(home: &Home) -> bool {
    let member = begun(home, "a").await;
    let member = &member;
    let renewed = Mutex::new(false);
    let beside = async {
        let renewal = member.renew(&home.admin);
        let renewal = tokio::time::timeout(Duration::from_secs(1), renewal).await;
        *renewed.lock().await = renewal.is_ok();
    };
    let slow = Slow {
        target: layout::claims(&db(), "1").join("1"),
        meanwhile: Mutex::new(Some(Box::pin(beside))),
        ..home.slow()
    };
    member.claim(&slow, &db(), "1").await.unwrap();
    drop(slow);
    renewed.into_inner()
}

#[tokio::test]
async fn a_claim_that_waits_keeps_no_renewal_waiting() {
    assert!(renews_beside_a_claim(&Home::new()).await);
    let _back = mutant::put_back(Mutant::RenewalWaitsForCalls);
    assert!(!renews_beside_a_claim(&Home::new()).await);
}

/// The server forgets the renewals of the last seconds: whether a host that made some of them is
/// taken for dead, because it seems to have made none since.
async fn is_ended_after_forgetting(home: &Home) -> bool {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    a.hold(&home.admin, &db(), Access::Shared).await.unwrap();
    assert_eq!(b.holdings(&home.admin, &db()).await.unwrap().len(), 1);
    // The times of files go by the machine's clock: those of a seem to be as old as this.
    let store = home.slow();
    for _ in 0..5 {
        home.clock.pass(5);
        b.renew(&store).await.unwrap();
    }
    home.forget_renewals("b", 2);
    home.clock.pass(5);
    b.holdings(&store, &db()).await.unwrap_err();
    b.holdings(&store, &db()).await.unwrap().is_empty()
}

#[tokio::test]
async fn a_server_that_forgets_makes_nobody_silent() {
    assert!(!is_ended_after_forgetting(&Home::new()).await);
    let _back = mutant::put_back(Mutant::SilenceOutlivesForgetting);
    assert!(is_ended_after_forgetting(&Home::new()).await);
}

#[tokio::test]
async fn a_way_that_is_stuck_keeps_no_renewal_waiting() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    let stuck = Slow {
        stuck: true,
        ..home.slow()
    };
    home.clock.pass(10);
    // Needs a renewal first: its right does not last for long any more.
    let volume = db();
    let held = member.holdings(&stuck, &volume);
    let held = tokio::time::timeout(Duration::from_secs(5), held).await;
    assert_eq!(held.expect("it renews by another way").unwrap(), []);
}

/// The server forgets the documents of a host since one that said the same as the last: whether
/// that is put right.
async fn looks_again_after_going_back(home: &Home) -> bool {
    let a = begun(home, "a").await;
    let (first, contents) = (home.last_document("a"), home.last_document("a"));
    let contents = fs::read(contents).unwrap();
    a.hold(&home.admin, &db(), Access::Shared).await.unwrap();
    a.release(&home.admin, &[db()]).await;
    for document in home.names("hosts").iter().filter(|d| d.starts_with("a.")) {
        fs::remove_file(home.path("hosts").join(document)).unwrap();
    }
    fs::write(first, contents).unwrap();
    a.look(&home.admin).await.unwrap_err();
    a.beat(&home.admin).await.unwrap();
    a.look(&home.admin).await.is_ok()
}

#[tokio::test]
async fn an_equal_document_that_is_back_is_written_anew() {
    assert!(looks_again_after_going_back(&Home::new()).await);
    let _back = mutant::put_back(Mutant::BehindIsEqual);
    assert!(!looks_again_after_going_back(&Home::new()).await);
}

/// The token of a silent host is forgotten, and the host comes back while another one takes it for
/// dead: whether both are of one mind afterwards.
async fn comes_back_beside_its_end(home: &Home) -> bool {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    a.hold(&home.admin, &db(), Access::Shared).await.unwrap();
    assert_eq!(b.holdings(&home.admin, &db()).await.unwrap().len(), 1);
    fs::remove_file(home.path("hosts/a").join(home.token("a"))).unwrap();
    let back = async {
        a.beat(&home.admin).await.unwrap_err();
        a.beat(&home.admin).await.unwrap();
    };
    let store = Slow {
        target: layout::host_dir("a"),
        meanwhile: Mutex::new(Some(Box::pin(back))),
        ..home.slow()
    };
    for _ in 0..6 {
        home.clock.pass(5);
        b.renew(&store).await.unwrap();
    }
    home.clock.pass(5);
    b.holdings(&store, &db()).await.unwrap();
    assert!(store.meanwhile.lock().await.is_none(), "it came back");
    a.beat(&home.admin).await.unwrap();
    assert!(a.has_right());
    !b.holdings(&home.admin, &db()).await.unwrap().is_empty()
}

#[tokio::test]
async fn a_host_that_comes_back_without_a_token_lives_for_all() {
    assert!(comes_back_beside_its_end(&Home::new()).await);
    let _back = mutant::put_back(Mutant::ProofWithoutToken);
    assert!(!comes_back_beside_its_end(&Home::new()).await);
}

#[tokio::test]
async fn a_host_all_of_whose_documents_are_torn_waits_for_itself() {
    let home = Home::new();
    begun(&home, "a").await;
    for document in home.names("hosts").iter().filter(|d| d.starts_with("a.")) {
        fs::write(home.path("hosts").join(document), "").unwrap();
    }
    assert!(waits_for_its_namesake(&home, &home.member("a")).await);
}

/// Whether a host that seems to be another one of its name has a session when that has been silent
/// for as long as any other, though nobody else is there to end it.
async fn waits_for_its_namesake(home: &Home, member: &Member<Clock>) -> bool {
    let mut waited = 0;
    while let Err(error) = member.beat(&home.admin).await {
        assert!(matches!(error, MemberError::SameName(_)), "{error}");
        assert!(error.is_transient());
        // As the daemon does, whether it has a session or not.
        member.look(&home.admin).await.unwrap();
        if waited > 2 * SESSION.as_secs() {
            return false;
        }
        home.clock.pass(5);
        waited += 5;
    }
    assert!(waited >= SESSION.as_secs() / 2, "{waited} s");
    true
}

/// This host with another id, as in a new state directory.
fn anew(home: &Home, name: &str) -> Member<Clock> {
    let mut host = home.member(name).host;
    host.id = "another id".to_owned();
    Member::new(host, Times::new(SESSION), home.clock.clone(), [])
}

#[tokio::test]
async fn a_host_with_a_new_state_directory_waits_for_itself() {
    let home = Home::new();
    begun(&home, "a").await;
    let back = mutant::put_back(Mutant::NamesakesAreForgotten);
    assert!(!waits_for_its_namesake(&home, &anew(&home, "a")).await);
    drop(back);
    assert!(waits_for_its_namesake(&home, &anew(&home, "a")).await);
}

/// A host's document is torn and its token forgotten: whether it counts as holding nothing.
async fn holds_nothing_unseen(home: &Home) -> bool {
    let (a, b) = (begun(home, "a").await, begun(home, "b").await);
    a.hold(&home.admin, &db(), Access::Shared).await.unwrap();
    fs::write(home.last_document("a"), "").unwrap();
    fs::remove_file(home.path("hosts/a").join(home.token("a"))).unwrap();
    let before = b.holdings(&home.admin, &db()).await.is_ok();
    let store = home.slow();
    for _ in 0..6 {
        home.clock.pass(5);
        b.renew(&store).await.unwrap();
    }
    assert_eq!(b.holdings(&store, &db()).await.unwrap(), []);
    before
}

#[tokio::test]
async fn a_host_of_which_nothing_can_be_read_is_waited_for() {
    assert!(!holds_nothing_unseen(&Home::new()).await);
    let _back = mutant::put_back(Mutant::AbsenceEndsSessions);
    assert!(holds_nothing_unseen(&Home::new()).await);
}

/// Whether a daemon that has just started sees what it goes on with: whoever asks in its session,
/// and whoever sees the first right of it.
async fn goes_on_in_sight(home: &Home) -> [bool; 2] {
    assert!(mine(home, &begun(home, "a").await).await);
    let again = home.member("a");
    let asked = again.held_in_session(&home.admin).await.unwrap();

    let again = home.member("a");
    let seen = Mutex::new(false);
    let renewal = async {
        again.renew(&home.admin).await.unwrap();
        assert!(again.has_right());
        *seen.lock().await = again.held().contains_key(&db());
    };
    // A renewal comes before the first document is written.
    let slow = Slow {
        target: layout::hosts(),
        meanwhile: Mutex::new(Some(Box::pin(renewal))),
        ..home.slow()
    };
    again.tend(&slow).await.unwrap();
    drop(slow);
    [asked.contains_key(&db()), seen.into_inner()]
}

#[tokio::test]
async fn what_a_new_daemon_goes_on_with_is_seen_at_once() {
    assert_eq!(goes_on_in_sight(&Home::new()).await, [true, true]);
    let _back = mutant::put_back(Mutant::GoingOnIsSeenLate);
    assert_eq!(goes_on_in_sight(&Home::new()).await, [false, false]);
}

#[tokio::test]
async fn what_was_lost_is_not_had_again_before_that_was_told() {
    let home = Home::new();
    let member = begun(&home, "a").await;
    assert!(mine(&home, &member).await);
    let (name, dir) = (home.token("a"), home.path("hosts/a"));
    fs::rename(dir.join(&name), dir.join(name.replace("alive", "ended"))).unwrap();
    assert_eq!(member.renew(&home.admin).await.unwrap(), Renewal::Over);
    let claimed = member.claim(&home.admin, &db(), "1").await;
    assert!(matches!(claimed, Err(MemberError::Ended)), "{claimed:?}");
    let told = member.tend(&home.admin).await.unwrap();
    assert_eq!(told, Beat::Lost(vec![db()]));
    assert!(mine(&home, &member).await);
}

/// The document of a host that holds `volumes`, as it lies on the share.
fn write(export: &Path, file: &str, host: &str, volumes: &[&VolumeName]) {
    let hold = |name: &&VolumeName| {
        let hold = Hold {
            nonce: "n".to_owned(),
            access: Access::default(),
            since: 0,
            holders: Vec::new(),
        };
        ((*name).clone(), hold)
    };
    let doc = HostDoc {
        format: FORMAT,
        host: host.to_owned(),
        id: "other".to_owned(),
        boot: "other".to_owned(),
        session: "s".to_owned(),
        session_ms: 30_000,
        holds: volumes.iter().map(hold).collect(),
    };
    let (name, _) = file.split_once('.').unwrap();
    let hosts = export.join(".nfsvol/hosts");
    fs::create_dir_all(hosts.join(name)).unwrap();
    fs::write(hosts.join(name).join("alive.s.1"), "").unwrap();
    fs::write(hosts.join(file), json(&doc)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_speaks_for_the_host_of_its_name_only() {
    let home = Home::new();
    let (export, admin, member) = (&home.dir, &home.admin, home.member("here"));
    let [db, web]: [VolumeName; 2] = ["db", "web"].map(|name| name.parse().unwrap());

    write(export.path(), "evil.1.json", "evil", &[]);
    assert!(member.holdings(admin, &db).await.unwrap().is_empty());

    // What it holds is not known now, so nothing may be removed; the others are heard all the same.
    write(export.path(), "evil.2.json", "../../elsewhere", &[]);
    write(export.path(), "other.1.json", "other", &[&web]);
    let unreadable = |error| matches!(error, MemberError::Unreadable(host) if host == "evil");
    assert!(unreadable(member.look(admin).await.unwrap_err()));
    assert!(unreadable(member.holdings(admin, &db).await.unwrap_err()));
    let others = member.others();
    assert_eq!(others.len(), 1, "{others:?}");
    assert!(others[0].doc.holds.contains_key(&web));

    // As the error says.
    for left in ["evil.1.json", "evil.2.json"] {
        fs::remove_file(export.path().join(".nfsvol/hosts").join(left)).unwrap();
    }
    fs::remove_dir_all(export.path().join(".nfsvol/hosts/evil")).unwrap();
    let held = member.holdings(admin, &web).await.unwrap();
    assert_eq!(held.len(), 1, "{held:?}");
    assert_eq!(held[0].host, "other");
}

/// Whether a host has a volume whose claims a restore has put elsewhere while it made its own.
async fn has_what_it_claimed_elsewhere() -> bool {
    let home = Home::new();
    let member = begun(&home, "a").await;
    assert!(mine(&home, &member).await);
    member.check_claim(&home.admin, &db()).await.unwrap();
    let claims = home.path("volumes/db/claims.1");
    fs::rename(&claims, home.path("tmp/from")).unwrap();
    fs::create_dir(&claims).unwrap();
    member.check_claim(&home.admin, &db()).await.is_ok()
}

#[tokio::test]
async fn a_claim_counts_where_the_volume_is() {
    assert!(!has_what_it_claimed_elsewhere().await);
    let _back = mutant::put_back(Mutant::ClaimsAreNotLookedFor);
    assert!(has_what_it_claimed_elsewhere().await);
}
