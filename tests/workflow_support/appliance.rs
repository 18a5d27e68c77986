//! The capture appliance: its API, and the agent that it starts.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

#[derive(Default)]
struct State {
    /// Agents by job.
    agents: Vec<(String, Child)>,
    /// Every call: path and body.
    calls: Vec<(String, Value)>,
    /// Where the VM's disks are, what the hub's API is, and what the agents are told.
    sources: PathBuf,
    api: String,
    options: Vec<String>,
    /// Answer to the next starts instead of success.
    refusal: Option<(u16, String)>,
    /// Says that agents live, whatever they do.
    blind: bool,
}

/// An appliance on a port of its own.
pub struct Appliance {
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Appliance {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || answer(&stream.unwrap(), &shared));
            }
        });
        Self { url, state }
    }

    /// The section of the hub's configuration.
    pub fn section(&self) -> String {
        format!("[agent]\nurl = \"{}\"\ntimeout_seconds = 5\npoll_seconds = 1\n", self.url)
    }

    pub fn serve(&self, sources: &std::path::Path, api: &str, options: &[&str]) {
        let mut state = self.state.lock().unwrap();
        state.sources = sources.to_owned();
        api.clone_into(&mut state.api);
        state.options = options.iter().map(|o| (*o).to_owned()).collect();
    }

    pub fn refuse(&self, refusal: Option<(u16, &str)>) {
        self.state.lock().unwrap().refusal = refusal.map(|(code, text)| (code, text.to_owned()));
    }

    pub fn be_blind(&self, blind: bool) {
        self.state.lock().unwrap().blind = blind;
    }

    pub fn calls(&self, path: &str) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        let found = state.calls.iter().filter(|(called, _)| called.starts_with(path));
        found.map(|(_, body)| body.clone()).collect()
    }

    pub fn kill_agents(&self) {
        for (_, agent) in &mut self.state.lock().unwrap().agents {
            let _ = agent.kill();
        }
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        self.kill_agents();
        for (_, agent) in &mut self.state.lock().unwrap().agents {
            let _ = agent.wait();
        }
    }
}

fn answer(stream: &TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap().to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, text) = handle(&path, &body, state);
    let mut stream = stream;
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
}

fn handle(path: &str, body: &Value, state: &Mutex<State>) -> (u16, String) {
    let mut state = state.lock().unwrap();
    state.calls.push((path.to_owned(), body.clone()));
    if path == "/api/v1/backup/start" {
        if let Some(refusal) = state.refusal.clone() {
            return refusal;
        }
        let job = body["job_id"].as_str().unwrap().to_owned();
        let start = state.sources.join("start.json");
        std::fs::write(&start, body.to_string()).unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(state.sources.join("agent.log"))
            .unwrap();
        let agent = Command::new("/usr/bin/python3")
            .arg("tests/sbc_job.py")
            .args([&start, &state.sources])
            .arg(&state.api)
            .args(&state.options)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let pid = agent.id();
        state.agents.push((job.clone(), agent));
        let reply = json!({"job_id": job, "status": "started", "message": "", "pid": pid,
            "started_at": "2026-01-01T00:00:00Z"});
        return (200, reply.to_string());
    }
    if let Some(job) = path.strip_prefix("/api/v1/status/") {
        let blind = state.blind;
        let found = state.agents.iter_mut().find(|(known, _)| known == job);
        let Some((_, agent)) = found else { return (404, "no such job".into()) };
        let alive = blind || agent.try_wait().unwrap().is_none();
        let status = if alive { "running" } else { "failed" };
        return (200, json!({"job_id": job, "status": status}).to_string());
    }
    (200, "{}".into())
}
