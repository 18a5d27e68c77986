"""A whole hub, and what a client asks of it."""

import json
import shutil
import urllib.request

import contenders as c

CONFIG = '[nbd]\nlisten = ["127.0.0.1:0"]\n[api]\nagent_listen = "127.0.0.1:0"\n[backups]\nmin_free = "0"\n'


class Hub(c.Server):
    """A hub on its defaults, with its data in a directory that is gone with it."""

    def __init__(self, program, directory):
        self.directory = directory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        config = directory / "hub.toml"
        config.write_text(CONFIG)
        arguments = [program, "serve", "--config", config, "--data-dir", directory / "data"]
        super().__init__(arguments, "", prints_uri=True)
        told = {}
        while (line := self.process.stdout.readline().decode().strip()) != "ready":
            key, value = line.split(": ", 1)
            told[key] = value
        self.api = told["agent api"]
        self.token = told["admin token, told this once"]

    def ask(self, method, path, body):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.api}/{path}", json.dumps(body).encode(), headers,
                                         method=method)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def begin(self, kind):
        """Starts a backup; its id and the URI of its export."""
        backup = self.ask("POST", "backups",
                          {"vm_name": "vm", "backup_type": kind, "agent": "caller"})
        assert backup["backup_type"] == kind, backup
        return backup["backup_id"], backup["nbd_targets_string"].split(":", 1)[1]

    def complete(self, backup):
        self.ask("POST", f"backups/{backup}/complete", {"change_id": backup, "disk_id": 0})

    def stop(self):
        super().stop()
        shutil.rmtree(self.directory, ignore_errors=True)
