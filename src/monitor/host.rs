//! Whether a request's Host header names this host. No I/O.
//!
//! A web page of anybody can make a browser ask any name that its author's DNS lets point here
//! (DNS rebinding), and may then read the answer as its own. It cannot make the browser say
//! another Host than that name, so names that are not this host's are refused.

use std::net::IpAddr;

/// The names that this host goes by.
#[derive(Debug, Clone, Default)]
pub struct Names(Vec<String>);

impl Names {
    /// The host's own name, and others that it was told of.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let plain = |name: String| name.trim_end_matches('.').to_ascii_lowercase();
        Self(names.into_iter().map(plain).collect())
    }

    /// Whether `host`, a header's `NAME`, `NAME:PORT` or `[IPV6]:PORT`, means this host, which was
    /// reached at the address `local`.
    #[must_use]
    pub fn has(&self, host: &str, local: IpAddr) -> bool {
        let (name, port, in_brackets) = match host.strip_prefix('[') {
            Some(rest) => match rest.split_once(']') {
                Some((ip, port)) => (ip, port, true),
                None => return false,
            },
            None => {
                let colon = host.find(':').unwrap_or(host.len());
                let (name, port) = host.split_at(colon);
                (name, port, false)
            }
        };
        let digits = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        if !port.is_empty() && !port.strip_prefix(':').is_some_and(digits) {
            return false;
        }
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        match name.parse::<IpAddr>() {
            Ok(ip) => {
                let ip = ip.to_canonical();
                ip.is_loopback() || ip == local.to_canonical()
            }
            Err(_) if in_brackets || name.is_empty() => false,
            Err(_) => name == "localhost" || self.0.contains(&name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_hosts_names_are_taken() {
        let names = Names::new(["Node1".to_owned(), "node1.example.org.".to_owned()]);
        let local = "10.0.0.7".parse().unwrap();
        for ours in [
            "localhost",
            "localhost:9469",
            "LOCALHOST.:9469",
            "127.0.0.1:9469",
            "[::1]:9469",
            "[::1]",
            "10.0.0.7:9469",
            "[::ffff:10.0.0.7]:9469",
            "node1:9469",
            "NODE1",
            "node1.example.org:80",
        ] {
            assert!(names.has(ours, local), "{ours}");
        }
        for others in [
            "",
            ":9469",
            "evil.example",
            "node1.evil.example:9469",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.8:9469",
            "evil.example:9469:node1",
            "node1:9469:evil",
            "[::1",
            "[::1]x:9469",
            "[node1]:9469.evil",
            "node1@evil.example",
        ] {
            assert!(!names.has(others, local), "{others}");
        }
    }
}
