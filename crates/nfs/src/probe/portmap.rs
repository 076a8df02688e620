//! Asking the portmapper: version 2 over IPv4 (RFC 1833 section 3), rpcbind version 4 over IPv6,
//! where version 2 cannot name an address (RFC 1833 section 2).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nfs3_types::portmap::{IPPROTO_TCP, PMAP_PROG, PROGRAM, VERSION, mapping};
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{Opaque, XdrCodec};
use nfs3_types::{mount, nfs3};

use crate::connect::{Meter, Wire};

pub(super) const PORT: u16 = 111;
/// RPCBPROC_GETADDR of RPCBVERS4.
const RPCBIND_VERSION: u32 = 4;
const GETADDR: u32 = 3;

/// The ports that a portmapper named; none when it does not answer or does not know.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub(super) nfs: Option<u16>,
    pub(super) mount: Option<u16>,
}

pub(super) async fn ask(addr: IpAddr, within: Duration, meter: &Meter) -> Named {
    let to = SocketAddr::new(addr, PORT);
    // No reserved port: the portmapper tells anybody.
    let Ok(mut wire) = Wire::dial(to, false, within, meter).await else {
        return Named::default();
    };
    Named {
        nfs: port(&mut wire, addr, nfs3::PROGRAM, nfs3::VERSION).await,
        mount: port(&mut wire, addr, mount::PROGRAM, mount::VERSION).await,
    }
}

async fn port(wire: &mut Wire, addr: IpAddr, prog: u32, vers: u32) -> Option<u16> {
    let none = opaque_auth::default();
    let port = match addr {
        IpAddr::V4(_) => {
            let call = (PROGRAM, VERSION, PMAP_PROG::PMAPPROC_GETPORT as u32);
            let args = mapping {
                prog,
                vers,
                prot: IPPROTO_TCP,
                port: 0,
            };
            let port: u32 = wire.call(call, &none, &args).await.ok()?;
            u16::try_from(port).ok()?
        }
        IpAddr::V6(_) => {
            let args = Rpcb {
                prog,
                vers,
                netid: Opaque::borrowed(b"tcp6"),
                addr: Opaque::borrowed(b""),
                owner: Opaque::borrowed(b""),
            };
            let call = (PROGRAM, RPCBIND_VERSION, GETADDR);
            let address: Opaque<'_> = wire.call(call, &none, &args).await.ok()?;
            universal_port(std::str::from_utf8(&address).ok()?)?
        }
    };
    (port != 0).then_some(port)
}

/// The port of a universal address: its last two numbers are the high and low byte (RFC 5665
/// section 5.2.3.4).
fn universal_port(address: &str) -> Option<u16> {
    let mut parts = address.rsplit('.');
    let low: u8 = parts.next()?.parse().ok()?;
    let high: u8 = parts.next()?.parse().ok()?;
    parts.next()?;
    Some(u16::from_be_bytes([high, low]))
}

/// `struct rpcb` of RFC 1833.
#[derive(Debug, XdrCodec)]
struct Rpcb<'a> {
    prog: u32,
    vers: u32,
    netid: Opaque<'a>,
    addr: Opaque<'a>,
    owner: Opaque<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_universal_address_ends_in_its_port() {
        assert_eq!(universal_port("::.8.1"), Some(2049));
        assert_eq!(universal_port("10.0.0.1.78.80"), Some(20048));
        for text in ["", "8.1", "::.8.256", "::.x.1"] {
            assert_eq!(universal_port(text), None, "{text}");
        }
    }
}
