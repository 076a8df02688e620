//! NFS in user space: what a share is called, how it is reached, and directory operations on it.
//!
//! A comment that begins with `//=` cites what RFC 1813, 5531 or 4506 asks of a client
//! (docs/RFC.md lists it, by section), above the line that obeys it; `//= test` and its name stand
//! above what shows it.

pub mod address;
pub mod admin;
pub mod connect;
pub mod mutant;
pub mod probe;
pub mod rpc;
