use std::collections::HashMap;
use std::hash::Hash;

/// What was used last, as far as it fits.
pub(super) struct Recent<K, V> {
    entries: HashMap<K, Entry<V>>,
    most_bytes: u64,
    bytes: u64,
    clock: u64,
}

struct Entry<V> {
    value: V,
    bytes: u64,
    used: u64,
}

impl<K: Hash + Eq + Clone, V> Recent<K, V> {
    pub(super) fn new(most_bytes: u64) -> Self {
        Self {
            entries: HashMap::new(),
            most_bytes,
            bytes: 0,
            clock: 0,
        }
    }

    /// Bytes of all entries.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Looks without using.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, entry)| (key, &entry.value))
    }

    pub(super) fn get(&mut self, key: &K) -> Option<&V> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(&entry.value)
    }

    /// Keeps something, unless it is larger than all that may be kept.
    pub(super) fn insert(&mut self, key: K, value: V, bytes: u64) {
        self.remove(&key);
        if bytes > self.most_bytes {
            return;
        }
        self.shrink(self.most_bytes - bytes);
        self.clock += 1;
        self.bytes += bytes;
        let used = self.clock;
        self.entries.insert(key, Entry { value, bytes, used });
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.bytes -= entry.bytes;
        Some(entry.value)
    }

    /// Forgets what was used least recently until no more than so many bytes are left.
    pub(super) fn shrink(&mut self, bytes: u64) {
        while self.bytes > bytes {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(key) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            self.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_is_forgotten_first() {
        let mut recent = Recent::new(10);
        recent.insert("a", 1, 4);
        recent.insert("b", 2, 4);
        assert_eq!(recent.get(&"a"), Some(&1));
        recent.insert("c", 3, 4);
        assert_eq!(recent.get(&"a"), Some(&1));
        assert_eq!(recent.get(&"c"), Some(&3));
        assert_eq!(recent.get(&"b"), None);
        assert_eq!(recent.bytes(), 8);
        // Larger than everything: the others stay.
        recent.insert("d", 4, 11);
        assert_eq!(recent.get(&"d"), None);
        assert_eq!(recent.bytes(), 8);
        recent.insert("a", 5, 1);
        assert_eq!(recent.get(&"a"), Some(&5));
        assert_eq!(recent.bytes(), 5);
        recent.shrink(0);
        assert_eq!((recent.iter().count(), recent.bytes()), (0, 0));
    }
}
