//! Where metrics and the status page are served.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// An address to listen on, or none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Address(Option<SocketAddr>);

/// Text that is no address to listen on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no address to listen on: expected PORT (on 127.0.0.1), IP:PORT, [IPV6]:PORT or \"off\""
)]
pub struct AddressError(String);

impl Address {
    /// The socket's address, unless it is off.
    #[must_use]
    pub fn get(self) -> Option<SocketAddr> {
        self.0
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() || text == "off" {
            return Ok(Self(None));
        }
        let port = match text.split_once(':') {
            None => text,
            Some(("" | "localhost", port)) => port,
            Some(_) => "",
        };
        let address = match port.parse() {
            Ok(port) => Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
            Err(_) => text.parse(),
        };
        match address {
            Ok(address) if address.port() != 0 => Ok(Self(Some(address))),
            _ => Err(AddressError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_port_means_this_host_alone() {
        for (text, meant) in [
            ("9469", Some("127.0.0.1:9469")),
            (":9469", Some("127.0.0.1:9469")),
            ("localhost:9469", Some("127.0.0.1:9469")),
            ("0.0.0.0:9469", Some("0.0.0.0:9469")),
            ("[::1]:9469", Some("[::1]:9469")),
            ("off", None),
            ("", None),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(
                address.get().map(|a| a.to_string()).as_deref(),
                meant,
                "{text}"
            );
        }
    }

    #[test]
    fn what_cannot_be_listened_on_is_refused() {
        for text in [
            "0",
            "host:9469",
            "10.0.0.1",
            "::1",
            "99999",
            "9469x",
            "[::1]",
            ":",
        ] {
            let refused = text.parse::<Address>().unwrap_err().to_string();
            assert!(
                refused.contains(text) && refused.contains("127.0.0.1"),
                "{refused}"
            );
        }
    }
}
