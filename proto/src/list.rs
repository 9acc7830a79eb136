//! Many messages in one field or file, each behind its length: what would be `repeated` if it could
//! not be long.
//!
//! prost collects a repeated field before anybody may look at it, and an element that takes two bytes
//! on the wire may take a hundred in memory. From a list the elements come one at a time.

use bytes::Buf;
use prost::{DecodeError, Message};

/// Puts a message at the end of a list.
pub fn push(list: &mut Vec<u8>, message: &impl Message) {
    // A vector has room for everything that fits into memory.
    message.encode_length_delimited(list).expect("a vector grows");
}

/// The messages of a list. Ends after the first that cannot be decoded.
pub fn each<M: Message + Default, B: Buf>(
    mut list: B,
) -> impl Iterator<Item = Result<M, DecodeError>> {
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || !list.has_remaining() {
            return None;
        }
        let next = M::decode_length_delimited(&mut list);
        failed = next.is_err();
        Some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::SetReplicas;

    fn replicas(replicas: u32) -> SetReplicas {
        SetReplicas { region: "fr".to_owned(), replicas }
    }

    #[test]
    fn a_list_gives_what_was_put_in_and_ends_where_it_is_cut_off() {
        let mut list = Vec::new();
        (0..3).for_each(|number| push(&mut list, &replicas(number)));
        let read: Result<Vec<SetReplicas>, _> = each(&list[..]).collect();
        assert_eq!(read, Ok((0..3).map(replicas).collect()));
        let cut: Vec<Result<SetReplicas, _>> = each(&list[..list.len() - 1]).collect();
        assert_eq!(cut.len(), 3);
        assert!(cut[..2].iter().all(Result::is_ok) && cut[2].is_err());
    }
}
