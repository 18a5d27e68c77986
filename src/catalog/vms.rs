//! VMs and their disks.

use rusqlite::{OptionalExtension, Row, params};

use super::{Catalog, Result, conflict};
use crate::model::{Timestamp, VmId, vm_id};

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its id, which is also the name of its directories.
    pub id: VmId,
    /// Its name in vCenter.
    pub name: String,
    /// Its inventory path in vCenter; empty where nobody told.
    pub vm_path: String,
    /// What to log in to vCenter with.
    pub credential_id: Option<String>,
    /// Its disks, by number.
    pub disks: Vec<VmDisk>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDisk {
    /// Number of the disk, from 0 on.
    pub disk_id: u32,
    /// VMware's device key, such as 2000.
    pub disk_key: u32,
    /// Its place on the controller.
    pub unit_number: u32,
    /// Its name in vCenter.
    pub label: String,
    /// Bytes of the disk.
    pub capacity: u64,
}

impl Catalog {
    /// Enters a VM with its disks, or changes the one of that name; its id.
    ///
    /// # Errors
    /// `Conflict` where two disks have one number or one key; `Sqlite`.
    pub fn put_vm(&self, vm: &Vm) -> Result<VmId> {
        self.write(|t| {
            let now = Timestamp::now();
            let id = t
                .query_row("SELECT id FROM vms WHERE name = ?1", [&vm.name], |row| row.get(0))
                .optional()?
                .unwrap_or_else(|| if vm.id.is_empty() { vm_id(&vm.name) } else { vm.id.clone() });
            t.execute(
                "INSERT INTO vms (id, name, vm_path, credential_id, created_at, updated_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?5)
                 ON CONFLICT (id) DO UPDATE SET vm_path = ?3, credential_id = ?4, updated_at = ?5",
                params![id, vm.name, vm.vm_path, vm.credential_id, now],
            )
            .map_err(|e| {
                conflict(e, || format!("VM '{}' refers to a credential that is not there", vm.name))
            })?;
            t.execute("DELETE FROM vm_disks WHERE vm_id = ?1", [&id])?;
            for disk in &vm.disks {
                t.execute(
                    "INSERT INTO vm_disks VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![
                        id,
                        disk.disk_id,
                        disk.disk_key,
                        disk.unit_number,
                        disk.label,
                        i64::try_from(disk.capacity).unwrap_or(i64::MAX)
                    ],
                )
                .map_err(|e| {
                    conflict(e, || {
                        format!(
                            "disk {} (key {}) of VM '{}' is given twice, or its size is 0",
                            disk.disk_id, disk.disk_key, vm.name
                        )
                    })
                })?;
            }
            Ok(id)
        })
    }

    /// The VM of that name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn vm_by_name(&self, name: &str) -> Result<Option<Vm>> {
        Ok(self.vms_where("name = ?1", name)?.pop())
    }

    /// The VM of that id.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn vm(&self, id: &str) -> Result<Option<Vm>> {
        Ok(self.vms_where("id = ?1", id)?.pop())
    }

    /// All VMs, by name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn vms(&self) -> Result<Vec<Vm>> {
        self.vms_where("?1 = ''", "")
    }

    fn vms_where(&self, condition: &str, argument: &str) -> Result<Vec<Vm>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(&format!(
                "SELECT id, name, vm_path, credential_id FROM vms WHERE {condition} ORDER BY name"
            ))?;
            let rows = statement.query_map([argument], |row| {
                Ok(Vm {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    vm_path: row.get(2)?,
                    credential_id: row.get(3)?,
                    disks: Vec::new(),
                })
            })?;
            let mut vms: Vec<Vm> = rows.collect::<rusqlite::Result<_>>()?;
            let mut disks = c.prepare_cached(
                "SELECT disk_id, disk_key, unit_number, label, capacity_bytes FROM vm_disks
                 WHERE vm_id = ?1 ORDER BY disk_id",
            )?;
            for vm in &mut vms {
                vm.disks = disks.query_map([&vm.id], disk)?.collect::<rusqlite::Result<_>>()?;
            }
            Ok(vms)
        })
    }
}

fn disk(row: &Row<'_>) -> rusqlite::Result<VmDisk> {
    Ok(VmDisk {
        disk_id: row.get(0)?,
        disk_key: row.get(1)?,
        unit_number: row.get(2)?,
        label: row.get(3)?,
        capacity: row.get(4)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::CatalogError;

    fn disk(number: u32, key: u32) -> VmDisk {
        VmDisk {
            disk_id: number,
            disk_key: key,
            unit_number: number,
            label: String::new(),
            capacity: (1 << 30) + 513,
        }
    }

    #[test]
    fn a_vm_keeps_its_id_and_exact_sizes_and_two_disks_never_share_a_key() {
        let catalog = Catalog::in_memory().unwrap();
        let mut vm = Vm {
            id: String::new(),
            name: "odd name/-disk0".into(),
            vm_path: "/dc/vm/odd".into(),
            credential_id: None,
            disks: vec![disk(0, 2000), disk(1, 2001)],
        };
        let id = catalog.put_vm(&vm).unwrap();
        vm.disks[1].disk_key = 2000;
        assert!(matches!(catalog.put_vm(&vm), Err(CatalogError::Conflict(_))));
        let found = catalog.vm_by_name("odd name/-disk0").unwrap().unwrap();
        assert_eq!(found.disks, [disk(0, 2000), disk(1, 2001)], "nothing was changed");
        assert_eq!((found.id.as_str(), catalog.vms().unwrap().len()), (id.as_str(), 1));
    }
}
