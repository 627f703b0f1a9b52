//! The data set: a point-of-sale platform with a schema a tenant, and one careless statement.

/// The tenants' schemas.
pub const TENANTS: &[&str] = &["bakery", "bookshop", "bicycles", "florist", "greengrocer", "hardware"];

/// The table that is dropped.
pub const VICTIM: &str = "bakery.payments";

/// Rows and digest of the victim, as `rows|md5`.
pub const DIGEST: &str =
    "SELECT count(*) || '|' || md5(string_agg(p::text, E'\\n' ORDER BY p.id)) FROM bakery.payments p";

/// The statements that make the data set.
pub fn schema() -> String {
    let list = TENANTS.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
    format!("{}\n{}\n", TABLES.replace("TENANTS", &list), SALE.replace("TENANTS", &list))
}

const TABLES: &str = r"
DO $make$
DECLARE tenant text;
BEGIN
  FOREACH tenant IN ARRAY ARRAY[TENANTS] LOOP
    EXECUTE format($sql$
      CREATE SCHEMA %1$I;
      CREATE TABLE %1$I.customers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        name text NOT NULL, mail text NOT NULL, since timestamptz NOT NULL);
      CREATE TABLE %1$I.inventory (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        sku text NOT NULL UNIQUE, stock int NOT NULL, price numeric(10,2) NOT NULL);
      CREATE TABLE %1$I.orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        customer bigint NOT NULL REFERENCES %1$I.customers, placed timestamptz NOT NULL,
        total numeric(10,2) NOT NULL, note text NOT NULL);
      CREATE TABLE %1$I.payments (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        order_id bigint NOT NULL REFERENCES %1$I.orders, amount numeric(10,2) NOT NULL,
        method text NOT NULL, paid timestamptz NOT NULL);
      INSERT INTO %1$I.customers (name, mail, since)
        SELECT 'Customer ' || n, 'c' || n || '@example.org', now() - n * interval '1 hour'
        FROM generate_series(1, 2000) n;
      INSERT INTO %1$I.inventory (sku, stock, price)
        SELECT 'SKU-' || n, 100000, (n %% 97) + 0.99 FROM generate_series(1, 500) n;
      INSERT INTO %1$I.orders (customer, placed, total, note)
        SELECT 1 + n %% 2000, now() - n * interval '1 minute', (n %% 500) + 0.50, md5(n::text)
        FROM generate_series(1, 25000) n;
      INSERT INTO %1$I.payments (order_id, amount, method, paid)
        SELECT id, total, (ARRAY['card', 'cash', 'voucher'])[1 + id %% 3], placed FROM %1$I.orders;
    $sql$, tenant);
  END LOOP;
END $make$;
";

// A sale of the tenant whose table is gone fails, as it would in life; the others go on.
const SALE: &str = r"
CREATE SCHEMA shop;
CREATE TABLE shop.sales_made (at timestamptz NOT NULL);
CREATE FUNCTION shop.sale() RETURNS void LANGUAGE plpgsql AS $sale$
DECLARE tenant text := (ARRAY[TENANTS])[1 + floor(random() * array_length(ARRAY[TENANTS], 1))::int];
  item bigint := 1 + floor(random() * 500)::int;
BEGIN
  EXECUTE format($sql$
    WITH item AS (
      UPDATE %1$I.inventory SET stock = stock - 1 WHERE id = %2$s RETURNING price
    ), placed AS (
      INSERT INTO %1$I.orders (customer, placed, total, note)
      SELECT 1 + floor(random() * 2000)::int, clock_timestamp(), price, md5(random()::text) FROM item
      RETURNING id, total
    ) INSERT INTO %1$I.payments (order_id, amount, method, paid)
      SELECT id, total, 'card', clock_timestamp() FROM placed
  $sql$, tenant, item);
  INSERT INTO shop.sales_made VALUES (clock_timestamp());
EXCEPTION WHEN undefined_table THEN
  NULL;
END $sale$;
";

/// Drops the table and tells its last rows, their digest, and a moment between the two.
///
/// The lock keeps sales out, so nothing changes between the digest and the drop. It is on the
/// orders too, since the drop takes their foreign key away: taken later, it could deadlock.
pub fn drop_table() -> String {
    format!(
        "BEGIN;\nLOCK TABLE bakery.orders, {VICTIM} IN ACCESS EXCLUSIVE MODE;\n{DIGEST};\n\
         SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || ' UTC';\n\
         SELECT pg_sleep(0.3) IS NULL;\nDROP TABLE {VICTIM};\nCOMMIT;\n"
    )
}

/// How many rows, and their digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Rows.
    pub rows: u64,
    /// MD5 over all rows in order.
    pub md5: String,
}

impl Digest {
    /// Reads `rows|md5`.
    pub fn parse(line: &str) -> Result<Digest, String> {
        let parsed = line.trim().split_once('|').and_then(|(rows, md5)| Some((rows.parse().ok()?, md5)));
        let (rows, md5) = parsed.ok_or_else(|| format!("expected rows and a digest, got {line:?}"))?;
        Ok(Digest { rows, md5: md5.to_owned() })
    }
}

/// The last moment of a table.
#[derive(Clone, Debug)]
pub struct Mistake {
    /// A moment after the last change of the table and before the drop.
    pub moment: String,
    /// Rows then.
    pub rows: u64,
    /// Their digest.
    pub md5: String,
}

impl Mistake {
    /// Reads what [`drop_table`] printed.
    pub fn parse(text: &str) -> Result<Mistake, String> {
        let digest = text.lines().find(|line| line.contains('|')).unwrap_or_default();
        let Digest { rows, md5 } = Digest::parse(digest)?;
        let moment = text.lines().find(|line| line.ends_with(" UTC"));
        let moment = moment.ok_or_else(|| format!("no moment in {text:?}"))?.trim().to_owned();
        Ok(Mistake { moment, rows, md5 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_drop_prints_is_read() {
        let mistake = Mistake::parse("25012|abc\n2026-11-22 11:08:50.123456 UTC\nf\n").expect("parse");
        assert_eq!((mistake.rows, mistake.md5.as_str()), (25012, "abc"));
        assert_eq!(mistake.moment, "2026-11-22 11:08:50.123456 UTC");
        assert!(Mistake::parse("nothing").is_err());
    }
}
