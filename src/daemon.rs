//! The daemon as a process: put together, kept running, made known to Docker.
//!
//! | module | job |
//! |---|---|
//! | `serve` | socket, driver, background tasks and status page, put together |
//! | `managed` | the first process of a managed plugin, which keeps the daemon running |
//! | `settings` | flags and their names in the environment |
//! | `announce` | what Docker needs once after each of its starts |

pub(crate) mod announce;
pub(crate) mod managed;
pub(crate) mod serve;
pub(crate) mod settings;
