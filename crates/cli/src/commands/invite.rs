//! `mlxnode invite`: opens a window in which one node may join.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, wire};
use anyhow::Result;
use clap::Args;
use mlxnode_proto::v1::InviteRequest;

/// Let one more Mac in.
///
/// Prints a short code to type on the other Mac and a long token for scripts. Either works once, until it runs out; a new invite
/// replaces the one before.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode invite
  mlxnode invite --lifetime 60 --json")]
pub struct Invite {
    /// How long the invite is good for, in seconds (at most 3600).
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=3600))]
    lifetime: u32,
}

impl Invite {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let request = InviteRequest { lifetime_seconds: self.lifetime };
        let invite = wire::invite(connection.cluster().invite(request).await?.into_inner());
        if global.json {
            return output::json(&invite);
        }
        output::line(&format!("On the other Mac, within {} minutes:", self.lifetime.div_ceil(60)))?;
        output::line(&format!("\n  mlxnode join --invite {}\n", invite.code))?;
        output::line(&format!(
            "In scripts, or where mDNS does not reach:\n\n  mlxnode join --invite {}",
            invite.token
        ))
    }
}
