//! What partitions are for, by the numbers of their tables.

use super::Role;

/// Type GUIDs of GPT, as they are written.
const GPT: [(&str, &str); 33] = [
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI system"),
    ("21686148-6449-6e6f-744e-656564454649", "BIOS boot"),
    ("024dee41-33e7-11d3-9d69-0008c781f39f", "MBR partition scheme"),
    ("0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux filesystem"),
    ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"),
    ("e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"),
    ("a19d880f-05fc-4d3b-a006-743f0f84911e", "Linux RAID"),
    ("8da63339-0007-60c0-c436-083ac8230908", "Linux reserved"),
    ("bc13c2ff-59e6-4262-a352-b275fd6f7172", "Linux extended boot"),
    ("933ac7e1-2eb4-4f13-b844-0e14e2aef915", "Linux home"),
    ("3b8f8425-20e0-4f3b-907f-1a25a76f98e8", "Linux server data"),
    ("4d21b016-b534-45c2-a9fb-5c16e091fd2d", "Linux variable data"),
    ("44479540-f297-41b2-9af7-d131d5f0458a", "Linux root (x86)"),
    ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "Linux root (x86-64)"),
    ("b921b045-1df0-41c3-af44-4c6f280d3fae", "Linux root (ARM-64)"),
    ("8484680c-9521-48c6-9c11-b0720656f69e", "Linux usr (x86-64)"),
    ("ca7d7ccb-63ed-4c53-861c-1742536059cc", "LUKS"),
    ("7ffec5c9-2d00-49b7-8941-3ea10a5586b7", "dm-crypt"),
    ("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "Microsoft basic data"),
    ("e3c9e316-0b5c-4db8-817d-f92df00215ae", "Microsoft reserved"),
    ("de94bba4-06d1-4d40-a16a-bfd50179d6ac", "Windows recovery"),
    ("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "Windows dynamic disk metadata"),
    ("af9b60a0-1431-4f62-bc68-3311714a69ad", "Windows dynamic disk data"),
    ("e75caf8f-f680-4cee-afa3-b001e56efc2d", "Windows Storage Spaces"),
    ("48465300-0000-11aa-aa11-00306543ecac", "Apple HFS+"),
    ("7c3457ef-0000-11aa-aa11-00306543ecac", "Apple APFS"),
    ("6a898cc3-1dd2-11b2-99a6-080020736631", "ZFS"),
    ("83bd6b9d-7f41-11dc-be0b-001560b84f0f", "FreeBSD boot"),
    ("516e7cb4-6ecf-11d6-8ff8-00022d09712b", "FreeBSD data"),
    ("516e7cb5-6ecf-11d6-8ff8-00022d09712b", "FreeBSD swap"),
    ("516e7cb6-6ecf-11d6-8ff8-00022d09712b", "FreeBSD UFS"),
    ("516e7cba-6ecf-11d6-8ff8-00022d09712b", "FreeBSD ZFS"),
    ("aa31e02a-400f-11db-9590-000c2911d1b8", "VMware VMFS"),
];

/// A GUID as people write it: its first three fields lie on the disk in little-endian order.
pub(crate) fn guid(bytes: [u8; 16]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (index, place) in order.into_iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", bytes[place]));
    }
    text
}

/// The name and the role of a GPT partition's type.
pub(super) fn of_gpt(bytes: [u8; 16]) -> (String, Role) {
    let guid = guid(bytes);
    let name = GPT.iter().find(|(known, _)| *known == guid).map(|(_, name)| *name);
    let role = match name {
        Some("Windows dynamic disk metadata" | "Windows dynamic disk data") => Role::DynamicDisk,
        Some("Windows Storage Spaces") => Role::StorageSpaces,
        _ => Role::Any,
    };
    (name.map_or_else(|| format!("type {guid}"), str::to_owned), role)
}

/// The name and the role of an MBR partition's type.
pub(super) fn of_mbr(byte: u8) -> (String, Role) {
    let name = match byte {
        0x01 => "FAT12",
        0x04 | 0x06 | 0x0e => "FAT16",
        0x0b | 0x0c => "FAT32",
        0x07 => "NTFS or exFAT",
        0x11 | 0x14 | 0x16 | 0x17 | 0x1b | 0x1c | 0x1e => "hidden Windows",
        0x27 => "Windows recovery",
        0x42 => "Windows dynamic disk",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xa5 => "FreeBSD",
        0xa6 => "OpenBSD",
        0xa8 => "Apple UFS",
        0xa9 => "NetBSD",
        0xaf => "Apple HFS+",
        0xbf => "Solaris",
        0xee => "GPT protective",
        0xef => "EFI system",
        0xfb => "VMware VMFS",
        0xfd => "Linux RAID",
        _ => return (format!("type 0x{byte:02x}"), Role::Any),
    };
    (name.to_owned(), if byte == 0x42 { Role::DynamicDisk } else { Role::Any })
}
