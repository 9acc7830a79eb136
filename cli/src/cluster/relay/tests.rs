//! The relay between sockets of this process: what arrives, when, and what does not.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::*;

/// Longer than anything here takes on a busy machine, shorter than a person's patience.
const LONG: Duration = Duration::from_secs(20);
/// Long enough for what is on its way to arrive, were it not held up.
const A_WHILE: Duration = Duration::from_millis(200);

struct Pair {
    relay: Relay,
    dialler: TcpStream,
    target: TcpStream,
    listener: TcpListener,
}

/// `fr-a` has dialled `se-b` through a relay on whose links this was said.
async fn pair(words: &[&str]) -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let end = |name: &str| (name[..2].parse().unwrap(), name.parse().unwrap());
    let ends = Ends { dialler: end("fr-a"), target: end("se-b") };
    let changes = words.iter().map(|word| word.parse().unwrap()).collect();
    let relay = Relay::open(vec![Path { ends, target: address }], changes).unwrap();
    let dialler = dial(&relay, address).await;
    let (target, _) = listener.accept().await.unwrap();
    Pair { relay, dialler, target, listener }
}

async fn dial(relay: &Relay, address: SocketAddr) -> TcpStream {
    let via = relay.via(&"fr-a".parse().unwrap());
    TcpStream::connect(via.resolve(&address.to_string())).await.unwrap()
}

fn say(relay: &Relay, word: &str) {
    relay.switch.change_all(vec![word.parse().unwrap()]).unwrap();
}

async fn receive(socket: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    timeout(LONG, socket.read_exact(&mut bytes)).await.expect("it arrives").unwrap();
    bytes
}

async fn hears_nothing(socket: &mut TcpStream) -> bool {
    timeout(A_WHILE, socket.read_u8()).await.is_err()
}

#[tokio::test]
async fn bytes_arrive_whole_and_in_order_and_each_direction_is_late() {
    let mut pair = pair(&["fr-se=50ms"]).await;
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i * 31 % 251) as u8).collect();
    let start = Instant::now();
    let (sent_too, mut dialler) = (sent.clone(), pair.dialler);
    let writing = tokio::spawn(async move {
        dialler.write_all(&sent_too).await.unwrap();
        dialler
    });
    assert!(receive(&mut pair.target, sent.len()).await == sent);
    assert!(start.elapsed() >= Duration::from_millis(50));
    pair.dialler = writing.await.unwrap();
    let start = Instant::now();
    pair.target.write_all(b"x").await.unwrap();
    receive(&mut pair.dialler, 1).await;
    assert!(start.elapsed() >= Duration::from_millis(50));
}

#[tokio::test]
async fn an_end_of_one_direction_is_passed_on_and_leaves_the_other() {
    let mut pair = pair(&[]).await;
    pair.dialler.write_all(b"last").await.unwrap();
    pair.dialler.shutdown().await.unwrap();
    let mut all = Vec::new();
    timeout(LONG, pair.target.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all, b"last");
    pair.target.write_all(b"answer").await.unwrap();
    assert_eq!(receive(&mut pair.dialler, 6).await, b"answer");
}

#[tokio::test]
async fn a_narrow_link_takes_its_time() {
    let mut pair = pair(&["fr-se=800kbit"]).await;
    let start = Instant::now();
    let mut dialler = pair.dialler;
    let writing =
        tokio::spawn(async move { dialler.write_all(&[7; 40_000]).await.map(|()| dialler) });
    receive(&mut pair.target, 40_000).await;
    // 100 kB a second; the last chunk is not waited for.
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_cut_in_one_direction_holds_bytes_back_until_it_ends() {
    let mut pair = pair(&["fr->se=cut"]).await;
    pair.dialler.write_all(b"a").await.unwrap();
    assert!(hears_nothing(&mut pair.target).await);
    pair.target.write_all(b"b").await.unwrap();
    assert_eq!(receive(&mut pair.dialler, 1).await, b"b");
    say(&pair.relay, "fr->se=clear");
    assert_eq!(receive(&mut pair.target, 1).await, b"a");
}

#[tokio::test]
async fn a_cut_ends_connections_and_refuses_new_ones_until_it_is_cleared() {
    let mut pair = pair(&[]).await;
    say(&pair.relay, "fr-se=cut");
    for socket in [&mut pair.dialler, &mut pair.target] {
        assert!(timeout(LONG, socket.read_u8()).await.expect("it ends").is_err());
    }
    let address = pair.listener.local_addr().unwrap();
    let mut refused = dial(&pair.relay, address).await;
    assert!(timeout(LONG, refused.read_u8()).await.expect("it ends").is_err());
    say(&pair.relay, "fr-se=clear");
    let mut dialler = dial(&pair.relay, address).await;
    let (mut target, _) = pair.listener.accept().await.unwrap();
    dialler.write_all(b"c").await.unwrap();
    assert_eq!(receive(&mut target, 1).await, b"c");
}

#[tokio::test]
async fn what_passes_is_counted_by_pair_and_direction_and_nothing_once_it_is_cut() {
    let mut pair = pair(&[]).await;
    let traffic = |pair: &Pair| pair.relay.switch.traffic().remove(0);
    pair.dialler.write_all(b"five!").await.unwrap();
    receive(&mut pair.target, 5).await;
    pair.target.write_all(b"two").await.unwrap();
    receive(&mut pair.dialler, 3).await;
    let before = traffic(&pair);
    assert_eq!((before.connections, before.refused), (1, 0));
    assert_eq!((before.dialler.as_str(), before.target.as_str()), ("fr-a", "se-b"));
    assert_eq!((before.bytes_there, before.bytes_back, before.bytes()), (5, 3, 8));
    // Somebody who never stops talking is cut off in the middle.
    let mut dialler = pair.dialler;
    let talking =
        tokio::spawn(async move { while dialler.write_all(&[1; 1_000]).await.is_ok() {} });
    receive(&mut pair.target, 50_000).await;
    say(&pair.relay, "fr-se=cut");
    let cut = pair.relay.switch.traffic().remove(0);
    assert!(cut.bytes_there >= 50_005);
    talking.await.unwrap();
    let address = pair.listener.local_addr().unwrap();
    let mut refused = dial(&pair.relay, address).await;
    assert!(timeout(LONG, refused.read_u8()).await.expect("it ends").is_err());
    let after = pair.relay.switch.traffic().remove(0);
    assert_eq!((after.bytes_there, after.bytes_back), (cut.bytes_there, cut.bytes_back));
    assert_eq!((after.connections, after.refused), (1, 1));
}

#[tokio::test]
async fn a_slow_node_takes_many_times_as_long_to_answer() {
    let mut pair = pair(&["se-b=slow:10"]).await;
    let start = Instant::now();
    pair.dialler.write_all(b"?").await.unwrap();
    receive(&mut pair.target, 1).await;
    assert!(start.elapsed() < Duration::from_millis(200), "the question is not slow");
    tokio::time::sleep(Duration::from_millis(30)).await;
    pair.target.write_all(b"!").await.unwrap();
    receive(&mut pair.dialler, 1).await;
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_link_that_does_not_exist_changes_nothing() {
    let pair = pair(&["fr-se=30ms"]).await;
    let words = ["fr-se=cut", "fr-it=cut"].map(|word| word.parse().unwrap());
    let error = pair.relay.switch.change_all(words.into()).unwrap_err();
    assert!(error.contains("there is no fr-it; regions are fr, se"), "{error}");
    assert_eq!(pair.relay.switch.list(), [("fr-se".to_owned(), "30ms".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_changed_through_the_socket_in_the_data_directory() {
    let mut pair = pair(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().to_owned();
    let nobody = control::list(&data_dir).unwrap_err();
    assert!(nobody.to_string().contains("up --link"), "{nobody}");
    pair.relay.serve(&data_dir).unwrap();
    let asked = tokio::task::spawn_blocking(move || {
        let set = control::set(&data_dir, vec!["fr-se=5ms".to_owned()]).unwrap();
        let wrong = control::set(&data_dir, vec!["fr-se=5".to_owned()]).unwrap_err();
        let traffic = control::traffic(&data_dir).unwrap();
        (set, wrong.to_string(), control::list(&data_dir).unwrap(), traffic)
    });
    let (set, wrong, listed, traffic) = asked.await.unwrap();
    assert_eq!(traffic, pair.relay.switch.traffic());
    assert_eq!(set, [("fr-se".to_owned(), "5ms".to_owned())]);
    assert!(wrong.starts_with("refused: \"5\""), "{wrong}");
    assert_eq!(listed, set);
}
