//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::directories::Directory;
use crate::saved::{FsStateError, HandleStateV1};

/// An open file or directory.
#[derive(Clone, Debug)]
pub(crate) enum Handle {
    /// A regular file.
    File { file: Arc<OwnedFd>, writable: bool },
    /// A directory; none for a synthetic one.
    Directory(Option<Arc<Directory>>),
    /// One of a restored session that could not be opened again.
    Lost,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    open: Option<(u64, Handle)>,
}

/// The table of handles.
#[derive(Debug)]
pub(crate) struct Handles {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Open files of nodes.
    of_node: HashMap<u64, Vec<u32>>,
    max: usize,
}

impl Handles {
    pub(crate) fn new(max: u32) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            of_node: HashMap::new(),
            max: usize::try_from(max).unwrap_or(usize::MAX),
        }
    }

    /// Returns the number of open files and directories.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Returns true if a further file can be opened.
    pub(crate) fn has_room(&self) -> bool {
        self.len() < self.max
    }

    /// Adds a handle of the node with number `node`; returns the handle's number.
    ///
    /// # Errors
    /// `ENFILE` if there are too many.
    pub(crate) fn insert(&mut self, node: u64, handle: Handle) -> Result<u64, Errno> {
        if !self.has_room() {
            return Err(Errno::NFILE);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len()).map_err(|_| Errno::NFILE)?;
                self.slots.push(Slot::default());
                slot
            }
        };
        if matches!(handle, Handle::File { .. }) {
            self.of_node.entry(node).or_default().push(slot);
        }
        let entry = &mut self.slots[slot as usize];
        entry.open = Some((node, handle));
        Ok(u64::from(entry.generation) << 32 | u64::from(slot))
    }

    fn slot(&self, number: u64) -> Option<(u32, &Slot)> {
        let low = u32::try_from(number & 0xffff_ffff).ok()?;
        let slot = self.slots.get(low as usize)?;
        (u64::from(slot.generation) == number >> 32).then_some((low, slot))
    }

    /// Returns handle `number` of node `node`.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub(crate) fn get(&self, number: u64, node: u64) -> Result<&Handle, Errno> {
        match self.slot(number) {
            Some((_, slot)) => match &slot.open {
                Some((of, handle)) if *of == node => Ok(handle),
                _ => Err(Errno::BADF),
            },
            None => Err(Errno::BADF),
        }
    }

    /// Returns the regular file that is open as `number`.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub(crate) fn file(&self, number: u64, node: u64) -> Result<&Arc<OwnedFd>, Errno> {
        match self.get(number, node)? {
            Handle::File { file, .. } => Ok(file),
            Handle::Directory(_) => Err(Errno::BADF),
            Handle::Lost => Err(Errno::IO),
        }
    }

    /// Returns the regular file that is open for writing as `number`.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub(crate) fn writable(&self, number: u64, node: u64) -> Result<&Arc<OwnedFd>, Errno> {
        match self.get(number, node)? {
            Handle::File {
                file,
                writable: true,
            } => Ok(file),
            Handle::Lost => Err(Errno::IO),
            _ => Err(Errno::BADF),
        }
    }

    /// Returns a file of `node` that is open, for writing if `write` is set.
    pub(crate) fn any_of(&self, node: u64, write: bool) -> Option<Arc<OwnedFd>> {
        let slots = self.of_node.get(&node)?;
        slots.iter().find_map(
            |slot| match &self.slots.get(*slot as usize)?.open.as_ref()?.1 {
                Handle::File { file, writable } if *writable || !write => Some(Arc::clone(file)),
                _ => None,
            },
        )
    }

    /// Closes handle `number` of node `node`.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub(crate) fn remove(&mut self, number: u64, node: u64) -> Result<(), Errno> {
        self.get(number, node)?;
        let (at, _) = self.slot(number).ok_or(Errno::BADF)?;
        let slot = &mut self.slots[at as usize];
        slot.open = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(at);
        if let Some(slots) = self.of_node.get_mut(&node) {
            slots.retain(|slot| *slot != at);
            if slots.is_empty() {
                self.of_node.remove(&node);
            }
        }
        Ok(())
    }

    /// Returns all handles: number, number of the node, and what is open.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &Handle)> {
        (0u64..).zip(&self.slots).filter_map(|(at, slot)| {
            let (node, handle) = slot.open.as_ref()?;
            Some((u64::from(slot.generation) << 32 | at, *node, handle))
        })
    }

    /// Adds the handles of a saved session, which are lost until [`Self::replace`].
    ///
    /// # Errors
    /// Too many of them, or two with one number.
    pub(crate) fn restore(&mut self, saved: &[HandleStateV1]) -> Result<(), FsStateError> {
        self.clear();
        self.free.clear();
        self.slots.clear();
        if saved.len() > self.max {
            return Err(FsStateError::TooMany {
                objects: "handles",
                count: saved.len(),
                most: self.max,
            });
        }
        let generations = saved.iter().map(|handle| handle.number >> 32);
        let newest = generations.max().unwrap_or(0);
        let unused = u32::try_from(newest + 1).unwrap_or(0);
        for handle in saved {
            self.put(handle, unused).ok_or(FsStateError::Malformed {
                object: "handle",
                number: handle.number,
            })?;
        }
        let slots = (0..).zip(&self.slots);
        self.free = slots
            .filter(|(_, slot)| slot.open.is_none())
            .map(|(at, _)| at)
            .collect();
        Ok(())
    }

    fn put(&mut self, saved: &HandleStateV1, unused: u32) -> Option<()> {
        let at = usize::try_from(saved.number & 0xffff_ffff).ok()?;
        if at >= self.max {
            return None;
        }
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || Slot {
                generation: unused,
                open: None,
            });
        }
        let slot = self.slots.get_mut(at)?;
        if slot.open.is_some() {
            return None;
        }
        slot.generation = u32::try_from(saved.number >> 32).ok()?;
        slot.open = Some((saved.node, Handle::Lost));
        Some(())
    }

    /// Replaces what is open as `number`.
    pub(crate) fn replace(&mut self, number: u64, handle: Handle) {
        let Some((at, _)) = self.slot(number) else {
            return;
        };
        if let Some((node, open)) = &mut self.slots[at as usize].open {
            if matches!(handle, Handle::File { .. }) {
                self.of_node.entry(*node).or_default().push(at);
            }
            *open = handle;
        }
    }

    /// Closes everything.
    pub(crate) fn clear(&mut self) {
        self.of_node.clear();
        for (at, slot) in (0..).zip(&mut self.slots) {
            if slot.open.take().is_some() {
                slot.generation = slot.generation.wrapping_add(1);
                self.free.push(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(writable: bool) -> Handle {
        Handle::File {
            file: Arc::new(tempfile::tempfile().unwrap().into()),
            writable,
        }
    }

    #[test]
    fn a_number_is_valid_for_its_node_until_it_is_closed() {
        let mut handles = Handles::new(2);
        let reading = handles.insert(7, file(false)).unwrap();
        assert_eq!(handles.file(reading, 8).unwrap_err(), Errno::BADF);
        assert_eq!(handles.writable(reading, 7).unwrap_err(), Errno::BADF);
        assert!(handles.any_of(7, true).is_none());
        let writing = handles.insert(7, file(true)).unwrap();
        assert!(handles.any_of(7, true).is_some());
        assert_eq!(handles.insert(7, file(true)).unwrap_err(), Errno::NFILE);

        assert_eq!(handles.remove(writing, 8).unwrap_err(), Errno::BADF);
        handles.remove(writing, 7).unwrap();
        assert_eq!(handles.remove(writing, 7).unwrap_err(), Errno::BADF);
        assert!(handles.any_of(7, true).is_none());
        let again = handles.insert(9, file(true)).unwrap();
        assert_ne!(again, writing);
        handles.clear();
        assert_eq!(handles.len(), 0);
        assert_eq!(handles.file(again, 9).unwrap_err(), Errno::BADF);
        assert!(handles.any_of(9, false).is_none());
    }
}
