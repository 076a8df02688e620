//! What the protocol needs of the share and of the host; a simulation has its own.

use std::future::Future;
use std::time::Duration;

use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, Made, ServerTime};

/// A time that the server set. Only compared with others of the same server.
pub type Stamp = ServerTime;

/// The longest document that is read, in bytes: some 20,000 holds.
const MAX_DOCUMENT: usize = 8 << 20;
const DIR_MODE: u32 = 0o755;

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    /// When the server changed it last, if it told.
    pub mtime: Option<Stamp>,
}

type Answer<T> = Result<T, AdminError>;

/// Directory operations of the home share. An error may mean that the change was made, or that
/// it still will be.
pub trait Store: Send + Sync {
    /// The same share by a way that is for renewals alone, where a call waits for no other and for
    /// its answer no longer than this.
    fn for_renewals(&self, answer: Duration) -> impl Store;
    /// The entries; `None` when there is no such directory. Names that are no UTF-8 are left out.
    fn list(&self, dir: &SharePath) -> impl Future<Output = Answer<Option<Vec<Entry>>>> + Send;
    /// When the object was last changed.
    fn mtime(&self, path: &SharePath) -> impl Future<Output = Answer<Option<Stamp>>> + Send;
    fn read(&self, file: &SharePath) -> impl Future<Output = Answer<Option<Vec<u8>>>> + Send;
    /// Makes or replaces a file as a whole.
    fn put(&self, file: &SharePath, contents: &[u8]) -> impl Future<Output = Answer<()>> + Send;
    /// Makes a file, if it is not there. Until it is filled it may be seen empty.
    fn create(&self, file: &SharePath, contents: &[u8]) -> impl Future<Output = Answer<()>> + Send;
    /// Makes a directory, if it is not there.
    fn make_dir(&self, dir: &SharePath) -> impl Future<Output = Answer<()>> + Send;
    /// Renames; a directory never replaces one that is not empty.
    fn rename(&self, from: &SharePath, to: &SharePath) -> impl Future<Output = Answer<()>> + Send;
    /// Renames within a directory; the directory's mtime afterwards.
    fn rename_within(
        &self,
        dir: &SharePath,
        from: &str,
        to: &str,
    ) -> impl Future<Output = Answer<Stamp>> + Send;
    /// Removes a file, or a directory with all that is in it.
    fn remove(&self, path: &SharePath) -> impl Future<Output = Answer<()>> + Send;
    /// Counts what may hide that the server was away, such as new connections.
    fn gaps(&self) -> u64 {
        0
    }
    /// Removes what is known to be a file; also when it is gone already.
    fn unlink(&self, file: &SharePath) -> impl Future<Output = Answer<()>> + Send {
        self.remove(file)
    }
}

/// The host's clock and its random numbers.
pub trait Env: Send + Sync {
    /// Time since some moment of this boot, counting suspension; it never goes back.
    fn now(&self) -> Duration;
    /// 16 hexadecimal digits that nobody else uses.
    fn nonce(&self) -> String;
}

impl Store for Admin {
    fn for_renewals(&self, answer: Duration) -> impl Store {
        Self::for_renewals(self, answer)
    }

    async fn list(&self, dir: &SharePath) -> Answer<Option<Vec<Entry>>> {
        let entries = Self::list(self, dir).await?;
        Ok(entries.map(|entries| {
            entries
                .into_iter()
                .filter_map(|entry| {
                    Some(Entry {
                        name: entry.name.into_string().ok()?,
                        mtime: entry.attr.map(|attr| attr.mtime),
                    })
                })
                .collect()
        }))
    }

    async fn mtime(&self, path: &SharePath) -> Answer<Option<Stamp>> {
        Ok(self.attr(path).await?.map(|attr| attr.mtime))
    }

    async fn read(&self, file: &SharePath) -> Answer<Option<Vec<u8>>> {
        Self::read(self, file, MAX_DOCUMENT).await
    }

    async fn put(&self, file: &SharePath, contents: &[u8]) -> Answer<()> {
        self.write(file, contents).await.map(drop)
    }

    async fn create(&self, file: &SharePath, contents: &[u8]) -> Answer<()> {
        match self.create_new(file, contents).await? {
            Made::New(_) | Made::Exists => Ok(()),
        }
    }

    async fn make_dir(&self, dir: &SharePath) -> Answer<()> {
        match self.mkdir(dir, DIR_MODE).await? {
            Made::New(_) | Made::Exists => Ok(()),
        }
    }

    async fn rename(&self, from: &SharePath, to: &SharePath) -> Answer<()> {
        Self::rename(self, from, to).await
    }

    async fn rename_within(&self, dir: &SharePath, from: &str, to: &str) -> Answer<Stamp> {
        Ok(Self::rename_within(self, dir, from, to).await?.mtime)
    }

    async fn remove(&self, path: &SharePath) -> Answer<()> {
        self.remove_tree(path, &|| true).await.map(drop)
    }

    fn gaps(&self) -> u64 {
        self.dials()
    }

    async fn unlink(&self, file: &SharePath) -> Answer<()> {
        Self::unlink(self, file).await.map(drop)
    }
}
