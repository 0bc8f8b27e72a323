//! An append-only file of JSON lines: each record is on disk before [`Journal::append`] returns. A record that a
//! crash left half written is cut off when the file is opened again; anything else that does not parse is an error.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::state::{State, StateError};

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path}, line {line} is damaged ({message}); restore the file from a backup, or delete that line")]
    Damaged { path: PathBuf, line: usize, message: String },
}

/// The open file. Whoever holds it is the only writer.
#[derive(Debug)]
pub struct Journal<T> {
    state: State,
    name: &'static str,
    /// None after a rewrite whose result could not be opened: the next append tries again.
    file: Option<File>,
    /// Bytes of whole records; what is behind it is a record that failed.
    length: u64,
    records: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> Journal<T> {
    /// Opens or makes the file and returns what it holds, oldest first.
    pub fn open(state: &State, name: &'static str) -> Result<(Journal<T>, Vec<T>), JournalError> {
        let path = state.path(name);
        let io_error = |action| {
            let path = path.clone();
            move |source| JournalError::Io { action, path, source }
        };
        if state.read(name)?.is_none() {
            state.create(name, b"")?;
        }
        let mut file = OpenOptions::new().read(true).write(true).mode(0o600).open(&path).map_err(io_error("open"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io_error("read"))?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let mut records = Vec::new();
        for (index, line) in bytes[..whole].split(|byte| *byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            records.push(serde_json::from_slice(line).map_err(|error| JournalError::Damaged {
                path: path.clone(),
                line: index + 1,
                message: error.to_string(),
            })?);
        }
        let mut journal =
            Journal { state: state.clone(), name, file: Some(file), length: whole as u64, records: PhantomData };
        if whole < bytes.len() {
            journal.cut_back().map_err(io_error("repair"))?;
        }
        Ok((journal, records))
    }

    /// Adds one record; on success it is on disk. On failure the file is as before, as far as the disk allows.
    pub fn append(&mut self, record: &T) -> Result<(), JournalError> {
        let mut line = serde_json::to_vec(record).map_err(|error| self.io_error("encode", error.into()))?;
        line.push(b'\n');
        let length = self.length;
        let written = self.file().and_then(|file| {
            file.seek(SeekFrom::Start(length))?;
            file.write_all(&line)?;
            file.sync_data()
        });
        if let Err(source) = written {
            let _ = self.cut_back();
            return Err(self.io_error("write", source));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Replaces the whole content, atomically.
    pub fn rewrite<'a>(&mut self, records: impl Iterator<Item = &'a T>) -> Result<(), JournalError>
    where
        T: 'a,
    {
        let mut bytes = Vec::new();
        for record in records {
            serde_json::to_writer(&mut bytes, record).map_err(|error| self.io_error("encode", error.into()))?;
            bytes.push(b'\n');
        }
        self.state.write(self.name, &bytes)?;
        // The open file is the old one now, which nobody will ever read again.
        self.file = None;
        self.length = bytes.len() as u64;
        Ok(())
    }

    fn cut_back(&mut self) -> io::Result<()> {
        let length = self.length;
        let file = self.file()?;
        file.set_len(length)?;
        file.sync_data()
    }

    fn file(&mut self) -> io::Result<&mut File> {
        let file = match self.file.take() {
            Some(file) => file,
            None => OpenOptions::new().read(true).write(true).open(self.state.path(self.name))?,
        };
        Ok(self.file.insert(file))
    }

    /// A journal whose every write fails for want of space.
    #[cfg(test)]
    pub(crate) fn on_a_full_disk(state: &State, name: &'static str) -> Journal<T> {
        let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has /dev/full");
        Journal { state: state.clone(), name, file: Some(full), length: 0, records: PhantomData }
    }

    fn io_error(&self, action: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { action, path: self.state.path(self.name), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(state: &State) -> Result<(Journal<u32>, Vec<u32>), JournalError> {
        Journal::open(state, "journal")
    }

    #[test]
    fn records_survive_and_a_torn_one_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (mut journal, records) = open(&state).unwrap();
        assert!(records.is_empty());
        journal.append(&1).unwrap();
        journal.append(&2).unwrap();
        let mut bytes = state.read("journal").unwrap().unwrap();
        bytes.extend_from_slice(b"34");
        state.write("journal", &bytes).unwrap();
        let (mut journal, records) = open(&state).unwrap();
        assert_eq!(records, [1, 2]);
        journal.append(&3).unwrap();
        journal.rewrite([2, 3].iter()).unwrap();
        journal.append(&4).unwrap();
        assert_eq!(open(&state).unwrap().1, [2, 3, 4]);
    }

    #[test]
    fn damage_is_told_with_its_line() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        state.write("journal", b"1\nx\n3\n").unwrap();
        let error = open(&state).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
