//! A short text that is copied into its owner instead of the heap: a request's path or authority, wanted only if the
//! request is logged or traced at its end. Copying a few dozen bytes costs less than an allocation, and unlike a
//! reference count it does not keep the connection's read buffer alive. Used by the HTTP record.

/// Up to `N` bytes in place, longer ones on the heap, cut at [`LONGEST`].
#[derive(Debug)]
pub(super) enum ShortText<const N: usize> {
    Inline { length: u8, bytes: [u8; N] },
    Heap(Box<str>),
}

/// Longer texts are cut: the queue of the access log holds thousands of them.
pub(super) const LONGEST: usize = 2048;

impl<const N: usize> ShortText<N> {
    const FITS_U8: () = assert!(N <= u8::MAX as usize);

    pub(super) fn empty() -> ShortText<N> {
        let () = Self::FITS_U8;
        ShortText::Inline { length: 0, bytes: [0; N] }
    }

    pub(super) fn copy(text: &str) -> ShortText<N> {
        if text.len() > N {
            return ShortText::Heap(text[..text.floor_char_boundary(LONGEST)].into());
        }
        let mut bytes = [0; N];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        ShortText::Inline { length: text.len() as u8, bytes }
    }

    pub(super) fn as_str(&self) -> &str {
        match self {
            // Whole characters went in; the fallback is unreachable and cheaper than a proof.
            ShortText::Inline { length, bytes } => std::str::from_utf8(&bytes[..*length as usize]).unwrap_or_default(),
            ShortText::Heap(text) => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        assert_eq!(ShortText::<8>::empty().as_str(), "");
        for text in ["", "/", "12345678", "123456789", "/ä/ö"] {
            assert_eq!(ShortText::<8>::copy(text).as_str(), text);
        }
        assert_eq!(ShortText::<8>::copy(&"ä".repeat(5000)).as_str(), "ä".repeat(LONGEST / 2));
        let odd = format!("x{}", "ä".repeat(5000));
        assert_eq!(ShortText::<8>::copy(&odd).as_str().len(), LONGEST - 1);
    }
}
