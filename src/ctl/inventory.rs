//! `sendense-ctl vm` and `sendense-ctl export`

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Context;
use super::error::{CtlError, CtlResult, Kind, OK};
use super::http::encode;
use super::output::{bytes, each, fields, message, number, table, word};
use crate::model::parse_size;

#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// List the VMs
    List,
    /// Show a VM and its disks
    Show(OfName),
    /// Enter a VM, or change it; what is not given stays as it is
    Set(SetArguments),
}

#[derive(Debug, Args)]
pub(super) struct OfName {
    /// Its name
    name: String,
}

#[derive(Debug, Args)]
pub(super) struct SetArguments {
    /// Name of the VM
    name: String,
    /// A disk: its number, its exact size such as 40G or 42949672960, and VMware's device key where
    /// it is known. Given once, these are all disks of the VM
    #[arg(long = "disk", value_name = "N:SIZE[:KEY]", value_parser = disk)]
    disks: Vec<Disk>,
    /// Its inventory path in vCenter
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Id or name of the credential for its vCenter
    #[arg(long, value_name = "NAME")]
    credential: Option<String>,
}

/// A disk as given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Disk {
    number: u32,
    size: u64,
    key: Option<u32>,
}

fn disk(text: &str) -> Result<Disk, String> {
    let odd = || format!("'{text}' is no disk such as 0:40G or 0:40G:2000");
    let mut parts = text.split(':');
    let (Some(number), Some(size), key, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(odd());
    };
    Ok(Disk {
        number: number.parse().map_err(|_| odd())?,
        size: parse_size(size)?,
        key: key.map(str::parse).transpose().map_err(|_| odd())?,
    })
}

pub(super) fn vm(context: &Context, command: VmCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    match command {
        VmCommand::List => {
            let list = api.get("/vms")?;
            out.show(&list, || {
                let rows: Vec<Vec<String>> = each(&list, "vms").map(vm_row).collect();
                table(&["NAME", "DISKS", "SIZE", "PATH", "CREDENTIAL"], &rows)
            })?;
        }
        VmCommand::Show(vm) => {
            let found = api.get(&format!("/vms/{}", encode(&vm.name)))?;
            out.show(&found, || describe(&found))?;
        }
        VmCommand::Set(arguments) => {
            let path = format!("/vms/{}", encode(&arguments.name));
            let known = match api.get(&path) {
                Ok(known) => known,
                Err(error) if error.kind == Kind::NotFound => Value::Null,
                Err(error) => return Err(error),
            };
            if known.is_null() && arguments.disks.is_empty() {
                let cause = format!("VM '{}' is new, and has no disks", arguments.name);
                return Err(CtlError::usage(cause, "give them: --disk 0:SIZE --disk 1:SIZE"));
            }
            let set = api.put(&path, &changed(&known, &arguments))?;
            out.done(&set, || describe(&set))?;
        }
    }
    Ok(OK)
}

/// A VM with what is given in place of what is known of it.
fn changed(known: &Value, arguments: &SetArguments) -> Value {
    let path = arguments.path.as_deref().or(known["vm_path"].as_str()).unwrap_or_default();
    let credential = arguments.credential.as_deref().or(known["credential_id"].as_str());
    let disk = |given: &Disk| {
        let before = each(known, "disks")
            .find(|disk| number(disk, "disk_id") == u64::from(given.number))
            .cloned();
        let mut disk = before.unwrap_or_else(|| json!({"disk_id": given.number}));
        disk["capacity_bytes"] = given.size.into();
        if let Some(key) = given.key {
            disk["disk_key"] = key.into();
        }
        disk
    };
    let disks: Vec<Value> = match arguments.disks.is_empty() {
        true => each(known, "disks").cloned().collect(),
        false => arguments.disks.iter().map(disk).collect(),
    };
    json!({"vm_path": path, "credential_id": credential, "disks": disks})
}

fn vm_row(vm: &Value) -> Vec<String> {
    let capacity: u64 = each(vm, "disks").map(|disk| number(disk, "capacity_bytes")).sum();
    vec![
        word(vm, "vm_name"),
        word(vm, "disks"),
        super::output::size(capacity),
        word(vm, "vm_path"),
        word(vm, "credential_id"),
    ]
}

fn describe(vm: &Value) -> String {
    let about = [
        ("vm", word(vm, "vm_name")),
        ("id", word(vm, "vm_context_id")),
        ("path", word(vm, "vm_path")),
        ("credential", word(vm, "credential_id")),
    ];
    let rows: Vec<Vec<String>> = each(vm, "disks")
        .map(|disk| {
            vec![
                word(disk, "disk_id"),
                word(disk, "disk_key"),
                bytes(disk, "capacity_bytes"),
                word(disk, "capacity_bytes"),
                word(disk, "label"),
            ]
        })
        .collect();
    format!("{}\n\n{}", fields(&about), table(&["DISK", "KEY", "SIZE", "BYTES", "LABEL"], &rows))
}

#[derive(Debug, Subcommand)]
pub(super) enum ExportCommand {
    /// List what is served over NBD, backups that run included
    List,
    /// Serve an image of a repository, read-only
    Add(ExportArguments),
    /// Serve it no more
    Remove(OfName),
}

#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// Its name
    name: String,
    /// The image, as the hub sees it
    path: String,
    /// Most connections at a time
    #[arg(long, value_name = "N")]
    max_connections: Option<u32>,
}

pub(super) fn export(context: &Context, command: ExportCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    match command {
        ExportCommand::List => {
            let list = api.get("/nbd/exports")?;
            out.show(&list, || exports(&list))?;
        }
        ExportCommand::Add(arguments) => {
            let wish = json!({
                "export_name": arguments.name,
                "path": arguments.path,
                "read_only": true,
                "max_connections": arguments.max_connections,
            });
            let added = api.post("/nbd/exports", &wish, super::http::LONG)?;
            out.done(&added, || {
                format!("'{}' is served: {}", arguments.name, bytes(&added, "size"))
            })?;
        }
        ExportCommand::Remove(export) => {
            let removed = api.delete(&format!("/nbd/exports/{}", encode(&export.name)))?;
            out.done(&removed, || message(&removed))?;
        }
    }
    Ok(OK)
}

fn exports(list: &Value) -> String {
    let rows: Vec<Vec<String>> = each(list, "exports")
        .map(|export| {
            vec![
                word(export, "name"),
                bytes(export, "size"),
                if export["read_only"] == true { "read" } else { "write" }.to_owned(),
                word(export, "connections"),
                bytes(&export["stats"], "bytes_read"),
                bytes(&export["stats"], "bytes_written"),
            ]
        })
        .collect();
    table(&["EXPORT", "SIZE", "FOR", "CONNECTIONS", "READ", "WRITTEN"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_number_a_size_and_perhaps_a_key() {
        assert_eq!(disk("1:2K"), Ok(Disk { number: 1, size: 2048, key: None }));
        assert_eq!(disk("0:7:2016"), Ok(Disk { number: 0, size: 7, key: Some(2016) }));
        for odd in ["", "0", "x:1", "0:y", "0:1:z", "0:1:2:3"] {
            assert!(disk(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn what_is_not_given_stays_as_it_is() {
        let known = json!({"vm_path": "/dc/vm", "credential_id": "c", "disks": [
            {"disk_id": 0, "disk_key": 2016, "label": "l", "capacity_bytes": 1}]});
        let arguments = |disks: &[Disk]| SetArguments {
            name: "web".into(),
            disks: disks.to_vec(),
            path: None,
            credential: Some("d".into()),
        };
        let view = changed(&known, &arguments(&[]));
        assert_eq!(view["disks"], known["disks"]);
        assert_eq!((&view["vm_path"], &view["credential_id"]), (&"/dc/vm".into(), &"d".into()));
        let view = changed(&known, &arguments(&[disk("0:2").unwrap(), disk("1:3:9").unwrap()]));
        assert_eq!(view["disks"][0]["disk_key"], 2016);
        assert_eq!(view["disks"][0]["capacity_bytes"], 2);
        assert_eq!(view["disks"][1], json!({"disk_id": 1, "disk_key": 9, "capacity_bytes": 3}));
    }
}
