//! NFS in user space: what a share is called, how it is reached, and directory operations on it.

pub mod address;
pub mod admin;
pub mod connect;
pub mod probe;
pub mod rpc;
