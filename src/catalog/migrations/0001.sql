-- Everything the hub knows. Times are RFC 3339 in UTC, sizes are bytes.
-- docs/catalog.md says what each column is and where the old hub had it.

CREATE TABLE credentials (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    vcenter_host TEXT NOT NULL,
    username     TEXT NOT NULL,
    secret       BLOB NOT NULL,
    created_at   TEXT NOT NULL
) STRICT;

CREATE TABLE vms (
    id            TEXT PRIMARY KEY,
    name          TEXT NOT NULL UNIQUE,
    vm_path       TEXT NOT NULL DEFAULT '',
    credential_id TEXT REFERENCES credentials(id),
    created_at    TEXT NOT NULL,
    updated_at    TEXT NOT NULL
) STRICT;

CREATE TABLE vm_disks (
    vm_id          TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
    disk_id        INTEGER NOT NULL CHECK (disk_id BETWEEN 0 AND 999),
    disk_key       INTEGER NOT NULL CHECK (disk_key > 0),
    unit_number    INTEGER NOT NULL,
    label          TEXT NOT NULL DEFAULT '',
    capacity_bytes INTEGER NOT NULL CHECK (capacity_bytes > 0),
    PRIMARY KEY (vm_id, disk_id),
    UNIQUE (vm_id, disk_key)
) STRICT;

CREATE TABLE repositories (
    id                 TEXT PRIMARY KEY,
    name               TEXT NOT NULL UNIQUE,
    type               TEXT NOT NULL,
    enabled            INTEGER NOT NULL DEFAULT 1,
    path               TEXT NOT NULL UNIQUE,
    config             TEXT NOT NULL DEFAULT '{}',
    is_immutable       INTEGER NOT NULL DEFAULT 0,
    min_retention_days INTEGER NOT NULL DEFAULT 0 CHECK (min_retention_days >= 0),
    created_at         TEXT NOT NULL
) STRICT;

CREATE TABLE policies (
    id                    TEXT PRIMARY KEY,
    name                  TEXT NOT NULL UNIQUE,
    enabled               INTEGER NOT NULL DEFAULT 1,
    primary_repository_id TEXT NOT NULL REFERENCES repositories(id),
    retention_days        INTEGER NOT NULL CHECK (retention_days >= 0),
    copy_rules            TEXT NOT NULL DEFAULT '[]',
    created_at            TEXT NOT NULL
) STRICT;

-- A row per backup of a VM; the backup is its job: one id, one state.
CREATE TABLE backups (
    id                   TEXT PRIMARY KEY,
    vm_id                TEXT NOT NULL REFERENCES vms(id),
    repository_id        TEXT NOT NULL REFERENCES repositories(id),
    policy_id            TEXT REFERENCES policies(id) ON DELETE SET NULL,
    type                 TEXT NOT NULL CHECK (type IN ('full', 'incremental')),
    requested_type       TEXT NOT NULL CHECK (requested_type IN ('full', 'incremental')),
    full_reason          TEXT,
    agent                TEXT NOT NULL CHECK (agent IN ('sna', 'caller')),
    state                TEXT NOT NULL CHECK (state IN ('queued', 'preparing', 'receiving',
                             'sealing', 'completed', 'failed', 'cancelled', 'deleting')),
    error                TEXT,
    tags                 TEXT NOT NULL DEFAULT '{}',
    bytes_transferred    INTEGER NOT NULL DEFAULT 0,
    agent_phase          TEXT,
    last_telemetry_at    TEXT,
    created_at           TEXT NOT NULL,
    started_at           TEXT,
    completed_at         TEXT
) STRICT;
CREATE UNIQUE INDEX one_running_backup_of_a_vm ON backups(vm_id)
    WHERE state IN ('queued', 'preparing', 'receiving', 'sealing');
CREATE INDEX backups_by_time ON backups(created_at);

CREATE TABLE disk_backups (
    backup_id          TEXT NOT NULL REFERENCES backups(id) ON DELETE CASCADE,
    disk_id            INTEGER NOT NULL,
    disk_key           INTEGER NOT NULL,
    capacity_bytes     INTEGER NOT NULL,
    state              TEXT NOT NULL CHECK (state IN ('receiving', 'sealed', 'completed', 'failed')),
    parent_backup_id   TEXT REFERENCES backups(id),
    previous_change_id TEXT NOT NULL DEFAULT '',
    change_id          TEXT,
    path               TEXT NOT NULL,
    export_name        TEXT NOT NULL,
    export_alias       TEXT NOT NULL,
    port               INTEGER,
    bytes_received     INTEGER NOT NULL DEFAULT 0,
    bytes_unchanged    INTEGER NOT NULL DEFAULT 0,
    stored_bytes       INTEGER,
    file_bytes         INTEGER,
    root_hash          TEXT,
    error              TEXT,
    sealed_at          TEXT,
    PRIMARY KEY (backup_id, disk_id),
    UNIQUE (backup_id, disk_key),
    UNIQUE (export_name),
    UNIQUE (export_alias)
) STRICT;
CREATE INDEX disk_backups_by_parent ON disk_backups(parent_backup_id);

-- One per full backup of a disk: moved only in the transaction that completes a backup.
CREATE TABLE chains (
    id             TEXT PRIMARY KEY,
    vm_id          TEXT NOT NULL REFERENCES vms(id),
    disk_id        INTEGER NOT NULL,
    repository_id  TEXT NOT NULL REFERENCES repositories(id),
    full_backup_id TEXT NOT NULL REFERENCES backups(id),
    head_backup_id TEXT NOT NULL REFERENCES backups(id),
    updated_at     TEXT NOT NULL,
    UNIQUE (full_backup_id, disk_id)
) STRICT;

-- Restore points in other repositories, with all that they build on.
CREATE TABLE backup_copies (
    id            TEXT PRIMARY KEY,
    backup_id     TEXT NOT NULL REFERENCES backups(id) ON DELETE CASCADE,
    repository_id TEXT NOT NULL REFERENCES repositories(id),
    state         TEXT NOT NULL CHECK (state IN ('pending', 'copying', 'completed', 'failed')),
    error         TEXT,
    bytes_copied  INTEGER NOT NULL DEFAULT 0,
    created_at    TEXT NOT NULL,
    completed_at  TEXT,
    UNIQUE (backup_id, repository_id)
) STRICT;

-- Exports that an operator added; those of backups are in disk_backups.
CREATE TABLE exports (
    name            TEXT PRIMARY KEY,
    path            TEXT NOT NULL,
    read_only       INTEGER NOT NULL,
    max_connections INTEGER,
    created_at      TEXT NOT NULL
) STRICT;

CREATE TABLE port_allocations (
    port         INTEGER PRIMARY KEY CHECK (port BETWEEN 1 AND 65535),
    job_id       TEXT NOT NULL,
    export_name  TEXT NOT NULL,
    allocated_at TEXT NOT NULL,
    expires_at   TEXT NOT NULL
) STRICT;

CREATE TABLE restore_mounts (
    id          TEXT PRIMARY KEY,
    backup_id   TEXT NOT NULL REFERENCES backups(id),
    disk_id     INTEGER NOT NULL,
    state       TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    used_at     TEXT NOT NULL
) STRICT;

CREATE TABLE events (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      TEXT NOT NULL,
    actor   TEXT NOT NULL,
    action  TEXT NOT NULL,
    subject TEXT NOT NULL,
    text    TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_subject ON events(subject);

CREATE TABLE tokens (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    role         TEXT NOT NULL CHECK (role IN ('viewer', 'operator', 'admin')),
    hash         BLOB NOT NULL UNIQUE,
    created_at   TEXT NOT NULL,
    last_used_at TEXT
) STRICT;
