//! A connection string taken apart: `keyword = value` pairs or a URI.

/// Pairs in the order in which they were written.
pub(super) type Pairs = Vec<(String, String)>;

/// Takes a connection string apart. Says what is wrong without repeating a value, which may be a
/// password.
pub(super) fn parse(text: &str) -> Result<Pairs, String> {
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => uri(rest),
        None => keywords(text),
    }
}

/// `host=/tmp port = 5432 password='it''s'`: values are quoted by `'`, and a backslash takes the
/// next character as it is (`conninfo_parse` in `fe-connect.c`).
fn keywords(text: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(pairs);
        }
        let mut name = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            name.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            return Err(match follows_password(&pairs) {
                // It may be the rest of it.
                true => "there is no \"=\" after a word that follows the password: a value with a space needs quotes"
                    .to_owned(),
                false => format!("there is no \"=\" after {name:?}"),
            });
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let value = value(&mut chars).map_err(|reason| match follows_password(&pairs) {
            true => reason,
            false => format!("{reason} of {name:?}"),
        })?;
        pairs.push((name, value));
    }
}

/// Whether a word here may be a part of a password whose space was not quoted.
pub(super) fn follows_password(pairs: &Pairs) -> bool {
    pairs.iter().any(|(name, _)| name.contains("password"))
}

fn value(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<String, String> {
    let mut value = String::new();
    let quoted = chars.next_if_eq(&'\'').is_some();
    loop {
        match chars.next() {
            Some('\\') => value.extend(chars.next()),
            Some('\'') if quoted => return Ok(value),
            Some(c) if quoted || !c.is_whitespace() => value.push(c),
            None if quoted => return Err("a quote is not closed in the value".into()),
            _ => return Ok(value),
        }
    }
}

/// `[user[:password]@][host[:port][,…]][/dbname][?keyword=value[&…]]`, percent-encoded.
fn uri(rest: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, database) = rest.split_once('/').map_or((rest, None), |(a, d)| (a, Some(d)));
    let (user, hosts) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
    if let Some(user) = user {
        let (name, password) = user.split_once(':').map_or((user, None), |(n, p)| (n, Some(p)));
        push(&mut pairs, "user", name)?;
        password.map_or(Ok(()), |password| push(&mut pairs, "password", password))?;
    }
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',').filter(|_| !hosts.is_empty()) {
        let (name, port) = host_and_port(host)?;
        names.push(name);
        ports.push(port);
    }
    if names.iter().any(|name| !name.is_empty()) {
        push(&mut pairs, "host", &names.join(","))?;
    }
    if ports.iter().any(|port| !port.is_empty()) {
        push(&mut pairs, "port", &ports.join(","))?;
    }
    database.map_or(Ok(()), |database| push(&mut pairs, "dbname", database))?;
    for pair in query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or("a parameter of the URI has no \"=\"")?;
        // `ssl=true` is what JDBC writes; libpq takes it too.
        match (name, value) {
            ("ssl", "true") => push(&mut pairs, "sslmode", "require")?,
            _ => push(&mut pairs, &decoded(name)?, value)?,
        }
    }
    Ok(pairs)
}

fn host_and_port(host: &str) -> Result<(&str, &str), String> {
    if let Some(rest) = host.strip_prefix('[') {
        let (address, port) = rest.split_once(']').ok_or("an IPv6 address of the URI has no \"]\"")?;
        return match port.strip_prefix(':') {
            Some(port) => Ok((address, port)),
            None if port.is_empty() => Ok((address, "")),
            None => Err("there is something other than a port after an IPv6 address".into()),
        };
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

fn push(pairs: &mut Pairs, name: &str, value: &str) -> Result<(), String> {
    let value = decoded(value)?;
    if !value.is_empty() {
        pairs.push((name.to_owned(), value));
    }
    Ok(())
}

fn decoded(text: &str) -> Result<String, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| (b as char).to_digit(16));
        let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else {
            return Err("a \"%\" in the URI is not followed by two hexadecimal digits".into());
        };
        match (high * 16 + low) as u8 {
            0 => return Err("the URI has a %00".into()),
            byte => out.push(byte),
        }
    }
    String::from_utf8(out).map_err(|_| "the URI is not UTF-8 once decoded".into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap()
    }

    fn of(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    #[test]
    fn keywords_are_read_as_libpq_reads_them() {
        assert_eq!(
            pairs(r"host = /tmp  port=5432 password='it\'s \\ a b' user=a\ b dbname="),
            of(&[
                ("host", "/tmp"),
                ("port", "5432"),
                ("password", r"it's \ a b"),
                ("user", "a b"),
                ("dbname", "")
            ])
        );
        assert_eq!(pairs("  "), of(&[]));
        assert!(parse("host").unwrap_err().contains("\"host\""));
        let unclosed = parse("password='secret").unwrap_err();
        assert!(unclosed.contains("password") && !unclosed.contains("secret"));
    }

    #[test]
    fn uris_are_read_as_libpq_reads_them() {
        assert_eq!(
            pairs("postgresql://me:p%40ss@a:1,[::1]:2,c/db?sslmode=verify-full&options=-c%20x%3D1"),
            of(&[
                ("user", "me"),
                ("password", "p@ss"),
                ("host", "a,::1,c"),
                ("port", "1,2,"),
                ("dbname", "db"),
                ("sslmode", "verify-full"),
                ("options", "-c x=1"),
            ])
        );
        assert_eq!(pairs("postgres:///db?host=/tmp"), of(&[("dbname", "db"), ("host", "/tmp")]));
        assert_eq!(pairs("postgres://%2Ftmp/db"), of(&[("host", "/tmp"), ("dbname", "db")]));
        for wrong in
            ["postgres://a%zz", "postgres://[::1", "postgres://[::1]x", "postgres://a?b", "postgres://a%00"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = parse(&text);
            let _ = parse(&format!("postgresql://{text}"));
        }

        #[test]
        fn every_value_survives_quoting(value in "[^\0]{0,40}") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            prop_assert_eq!(parse(&format!("password = '{quoted}' host=a")).unwrap(), of(&[("password", &value), ("host", "a")]));
        }
    }
}
