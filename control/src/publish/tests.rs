use proptest::prelude::*;

use super::*;

fn tcp(address: &str, guest: u16) -> Publication {
    Publication {
        host: HostEnd::Tcp(address.parse().unwrap()),
        guest: NonZeroU16::new(guest),
    }
}

#[test]
fn the_syntax_of_docker_is_parsed() {
    for (word, host, guest) in [
        ("80", "127.0.0.1:0", 80),
        ("8080:80", "127.0.0.1:8080", 80),
        ("8080:80/tcp", "127.0.0.1:8080", 80),
        ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
        ("127.0.0.1::80", "127.0.0.1:0", 80),
        ("[::1]:8080:80", "[::1]:8080", 80),
        ("auto", "127.0.0.1:0", 0),
    ] {
        assert_eq!(word.parse(), Ok(tcp(host, guest)), "{word}");
    }
}

#[test]
fn a_range_is_expanded_to_its_ports() {
    let shown = |word: &str| {
        let Ports(all) = word.parse().unwrap();
        let all: Vec<_> = all.iter().map(ToString::to_string).collect();
        all.join(" ")
    };
    assert_eq!(shown("8080:80/tcp"), "127.0.0.1:8080->80/tcp");
    assert_eq!(
        shown("8000-8001:80-81"),
        "127.0.0.1:8000->80/tcp 127.0.0.1:8001->81/tcp"
    );
    assert_eq!(
        shown("[::1]:8000-8001:80-81/tcp"),
        "[::1]:8000->80/tcp [::1]:8001->81/tcp"
    );
    assert_eq!(shown("80-81"), "127.0.0.1:0->80/tcp 127.0.0.1:0->81/tcp");
    assert_eq!(shown("0.0.0.0::80-80"), "0.0.0.0:0->80/tcp");
    assert_eq!(shown("auto"), "127.0.0.1:0->auto/tcp");
    let Ports(all) = "1-1000".parse().unwrap();
    assert_eq!(all.len(), 1000);
    for word in [
        "80-79",
        "1-1001",
        "8000-8001:80",
        "8000:80-81",
        "8000-8002:80-81",
        "0-1",
        "80-",
        "-80",
        "1-2-3",
        "80-81/udp",
        "65535-65536",
    ] {
        let error = word.parse::<Ports>().unwrap_err().to_string();
        assert!(error.contains(&format!("\"{word}\"")), "{error}");
    }
    let error = "53:53/udp".parse::<Ports>().unwrap_err().to_string();
    assert!(error.contains("only TCP"), "{error}");
}

#[test]
fn invalid_publications_are_refused_with_the_reason() {
    for word in [
        "", "0", "80/udp", "x:80", "65536:80", "80:0", "a.b:1:2", "1:2:3:4", "-1",
    ] {
        let error = word.parse::<Publication>().unwrap_err();
        assert!(
            error.to_string().contains(&format!("\"{word}\"")),
            "{error}"
        );
    }
    for word in ["", "80", ":80", "/x:0", "/x:y"] {
        assert!(Publication::unix(word).is_err(), "{word}");
    }
}

#[test]
fn handoff_and_hybrid_sockets_are_parsed() {
    let shown = |publication: Result<Publication, PublishError>| {
        publication.map(|publication| publication.to_string())
    };
    let handoff = |word| shown(Publication::handoff(word)).unwrap();
    assert_eq!(handoff("/run/h:80"), "handoff:/run/h->80/tcp");
    assert_eq!(handoff("/run/h"), "handoff:/run/h->auto/tcp");
    assert_eq!(handoff("/run/a:b"), "handoff:/run/a:b->auto/tcp");
    let hybrid = shown(Publication::hybrid("/run/v")).unwrap();
    assert_eq!(hybrid, "hybrid:/run/v->vsock");
    assert!(Publication::hybrid("").is_err() && Publication::handoff("").is_err());
}

#[test]
fn tls_options_are_parsed() {
    let Publication { host, guest } =
        Publication::tls("0.0.0.0:8443:80,cert=/c,key=/k,alpn=h2,alpn=http/1.1,sni=a.test:81")
            .unwrap();
    let HostEnd::Tls(end) = host else {
        panic!("{host}");
    };
    assert_eq!((guest, end.address.port()), (NonZeroU16::new(80), 8443));
    assert_eq!(end.protocols, ["h2", "http/1.1"]);
    assert_eq!(end.servers, [("a.test".to_owned(), 81)]);
    assert_eq!(
        Publication::tls("80").unwrap().to_string(),
        "tls:127.0.0.1:0->80/tcp"
    );
    for word in [
        "",
        "x",
        "80,",
        "80,cert=/c",
        "80,key=/k",
        "80,sni=a",
        "80,sni=a:0",
        "80,what=ever",
        "80,cert=,key=/k",
        "80,cert=/c,key=/k,name=a",
    ] {
        assert!(Publication::tls(word).is_err(), "{word}");
    }
}

#[test]
fn socket_paths_are_made_absolute() {
    let here = std::env::current_dir().unwrap();
    let Publication { host, guest } = Publication::unix("a:b:80").unwrap();
    assert_eq!(
        (host, guest),
        (HostEnd::Unix(here.join("a:b")), NonZeroU16::new(80))
    );
}

proptest! {
    #[test]
    fn parsing_any_word_does_not_panic(word in "[0-9a-z:./\\[\\]-]{0,24}") {
        let _ = word.parse::<Ports>();
    }

    #[test]
    fn a_displayed_address_is_parsed_back(port in any::<u16>(), guest in 1..=u16::MAX) {
        for address in ["127.0.0.1", "[::]"] {
            let parsed: Publication = format!("{address}:{port}:{guest}").parse().unwrap();
            prop_assert_eq!(parsed, tcp(&format!("{address}:{port}"), guest));
        }
    }
}
