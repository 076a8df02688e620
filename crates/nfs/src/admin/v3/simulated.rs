//! A server in a test's memory, in place of connections: each NFS call is one future of the test's.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nfs3_types::nfs3::nfs_fh3;
use nfs3_types::xdr_codec::{Pack, Unpack};

use tokio::time::Instant;

use super::{Route, V3};
use crate::address::Share;
use crate::admin::{Admin, AdminSettings, Inner, Way};
use crate::probe::Breaker;

/// The bytes of an answer, or the error of a connection that broke.
pub type Reply<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<u8>>> + Send + 'a>>;

pub trait Server: fmt::Debug + Send + Sync {
    /// Makes one call, given by the bytes of its arguments. A LOOKUP that only walks on wants to know
    /// where, and nothing else.
    fn call(&self, procedure: u32, args: Vec<u8>, walks: bool) -> Reply<'_>;
    /// How often a connection was made.
    fn dials(&self) -> u64;
}

#[derive(Debug, Clone)]
pub(super) struct Simulated {
    server: Arc<dyn Server>,
    route: Arc<Route>,
    /// The next call only walks on.
    walks: Arc<AtomicBool>,
}

impl V3 {
    /// What is looked up next is only walked through.
    pub(super) fn walks(&self) {
        if let Some(simulated) = &self.shared.simulated {
            simulated.walks.store(true, Ordering::Relaxed);
        }
    }
}

impl Simulated {
    pub(super) fn route(&self) -> Arc<Route> {
        Arc::clone(&self.route)
    }

    pub(super) fn dials(&self) -> u64 {
        self.server.dials()
    }

    pub(super) async fn call<R: Unpack>(
        &self,
        procedure: u32,
        args: &(impl Pack + Sync),
    ) -> io::Result<R> {
        let mut bytes = Vec::new();
        args.pack(&mut bytes).map_err(io::Error::other)?;
        let walks = self.walks.swap(false, Ordering::Relaxed);
        let reply = self.server.call(procedure, bytes, walks).await?;
        let (reply, _) = R::unpack(&mut reply.as_slice()).map_err(io::Error::other)?;
        Ok(reply)
    }
}

/// The same share by another way, with the handles that are kept.
pub fn again(admin: &Admin, server: Arc<dyn Server>, root: nfs_fh3) -> Admin {
    let new = self::admin(admin.share().clone(), server, root);
    if let (Way::V3(old), Way::V3(new)) = (&admin.0.way, &new.0.way) {
        let now = Instant::now();
        let kept = |handle: &nfs_fh3| (now, handle.clone());
        let old = old.state();
        let places = old.handles.iter();
        let again = places.map(|(place, handle)| {
            (
                place.clone(),
                handle.as_ref().map(|(_, handle)| kept(handle)),
            )
        });
        new.state().handles = again.collect();
    }
    new
}

/// A share on a server in memory.
pub fn admin(share: Share, server: Arc<dyn Server>, root: nfs_fh3) -> Admin {
    const SIZE: u32 = 1 << 20;
    let mut v3 = V3::new(share.clone(), AdminSettings::default(), Breaker::default());
    let route = Arc::new(Route {
        nfs: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        root,
        read: SIZE,
        write: SIZE,
    });
    if let Some(shared) = Arc::get_mut(&mut v3.shared) {
        shared.simulated = Some(Simulated {
            server,
            route,
            walks: Arc::default(),
        });
    }
    let way = Way::V3(Box::new(v3));
    let renewals = None;
    Admin(Arc::new(Inner {
        share,
        way,
        renewals,
    }))
}
