//! Entering a VM with its disks, as they are now.

use serde_json::{Value, json};

use crate::capture::Source;
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult, Kind};
use crate::ctl::http::encode;
use crate::ctl::output::{each, number, size};

/// Enters the VM with the sizes of its disks. What the hub knows of it already is kept.
pub(super) fn register(context: &Context, vm: &str, sources: &[Source]) -> CtlResult<()> {
    let path = format!("/vms/{}", encode(vm));
    let known = match context.api.get(&path) {
        Ok(known) => Some(known),
        Err(error) if error.kind == Kind::NotFound => None,
        Err(error) => return Err(error),
    };
    let sizes: Vec<u64> = sources.iter().map(Source::size).collect();
    let Some(known) = known else {
        let disks: Vec<Value> = (0u32..)
            .zip(&sizes)
            .map(|(number, size)| json!({"disk_id": number, "capacity_bytes": size}))
            .collect();
        context.out.note(&format!("VM '{vm}' is new to the hub; disks: {}", disks.len()));
        return context.api.put(&path, &json!({"disks": disks})).map(drop);
    };
    let (disks, notes) = merge(vm, &known, &sizes)?;
    if notes.is_empty() {
        return Ok(());
    }
    notes.iter().for_each(|note| context.out.note(note));
    let view = json!({
        "vm_path": known["vm_path"],
        "credential_id": known["credential_id"],
        "disks": disks,
    });
    context.api.put(&path, &view).map(drop)
}

/// The disks of a known VM with these sizes, and what is new about them in words.
fn merge(vm: &str, known: &Value, sizes: &[u64]) -> CtlResult<(Vec<Value>, Vec<String>)> {
    let mut disks = Vec::new();
    let mut notes = Vec::new();
    let given = sizes.len() as u64;
    if let Some(lost) = each(known, "disks").find(|disk| number(disk, "disk_id") >= given) {
        let cause = format!(
            "VM '{vm}' has a disk {}, but only {given} are given: it would not be backed up",
            number(lost, "disk_id")
        );
        let next =
            format!("give all disks, or take it from the VM: sendense-ctl vm set {vm} --disk");
        return Err(CtlError::usage(cause, next));
    }
    for (id, bytes) in (0u64..).zip(sizes) {
        let Some(disk) = each(known, "disks").find(|disk| number(disk, "disk_id") == id) else {
            notes.push(format!("disk {id} of VM '{vm}' is new: {}", size(*bytes)));
            disks.push(json!({"disk_id": id, "capacity_bytes": bytes}));
            continue;
        };
        let before = number(disk, "capacity_bytes");
        if before != *bytes {
            notes.push(format!("disk {id} of VM '{vm}' had {before} bytes and has {bytes} now"));
        }
        let mut disk = disk.clone();
        disk["capacity_bytes"] = (*bytes).into();
        disks.push(disk);
    }
    Ok((disks, notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Value {
        json!({"disks": [
            {"disk_id": 0, "disk_key": 2016, "label": "Hard disk 1", "capacity_bytes": 100},
            {"disk_id": 1, "disk_key": 2017, "label": "", "capacity_bytes": 200},
        ]})
    }

    #[test]
    fn sizes_are_taken_and_keys_are_kept() {
        let (disks, notes) = merge("web", &known(), &[100, 300, 400]).unwrap();
        assert_eq!(disks[0], known()["disks"][0]);
        assert_eq!(
            (&disks[1]["disk_key"], &disks[1]["capacity_bytes"]),
            (&2017.into(), &300.into())
        );
        assert_eq!(disks[2], json!({"disk_id": 2, "capacity_bytes": 400}));
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn nothing_new_is_nothing_to_enter() {
        assert!(merge("web", &known(), &[100, 200]).unwrap().1.is_empty());
    }

    #[test]
    fn a_disk_is_never_dropped_silently() {
        let error = merge("web", &known(), &[100]).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.cause.contains("disk 1"), "{error}");
    }
}
