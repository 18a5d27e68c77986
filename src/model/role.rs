//! Who may do what.

use super::words::words;

words! {
    /// What the holder of a token may do; each role includes the one before.
    Role {
        /// Look at everything but secrets.
        Viewer = "viewer",
        /// Run backups and restores, add and remove exports.
        Operator = "operator",
        /// Delete, and manage repositories, credentials and tokens.
        Admin = "admin",
    }
}
