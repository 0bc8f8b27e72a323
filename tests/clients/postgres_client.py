"""PostgreSQL by psycopg: python postgres_client.py HOST PORT SSLMODE. Queries, COPY, a pipeline, LISTEN and NOTIFY."""

import hashlib
import sys

import psycopg

host, port, sslmode = sys.argv[1:]
where = dict(host=host, port=port, user="postgres", dbname="postgres", sslmode=sslmode, connect_timeout=20)
table = f"items_{sslmode}_{port}"

with psycopg.connect(**where) as connection:
    assert connection.pgconn.ssl_in_use == (sslmode != "disable"), "TLS of its own where asked for"
    connection.execute(f"create table {table} (id int primary key, name text, data bytea)")
    with connection.cursor() as cursor:
        rows = [(number, f"näme {number}", bytes([number % 256]) * number) for number in range(300)]
        cursor.executemany(f"insert into {table} values (%s, %s, %s)", rows)
        assert cursor.execute(f"select * from {table} order by id").fetchall() == rows
    connection.commit()

    try:
        connection.execute("select * from nowhere")
        raise SystemExit("an answer from a table that is not there")
    except psycopg.errors.UndefinedTable:
        connection.rollback()

    # About 10 MB each way.
    line = "x" * 100
    with connection.cursor().copy(f"copy {table} (id, name) from stdin") as copy:
        for number in range(1000, 101_000):
            copy.write_row((number, line))
    digest = hashlib.sha256()
    count = 0
    with connection.cursor().copy(f"copy (select id, name from {table} where id >= 1000 order by id) to stdout") as copy:
        for row in copy.rows():
            digest.update(f"{row[0]} {row[1]}\n".encode())
            count += 1
    wanted = hashlib.sha256()
    for number in range(1000, 101_000):
        wanted.update(f"{number} {line}\n".encode())
    assert (count, digest.digest()) == (100_000, wanted.digest())
    connection.commit()

    with connection.pipeline():
        answers = [connection.execute("select %s::int * 2", (number,)) for number in range(200)]
    assert [answer.fetchone()[0] for answer in answers] == [number * 2 for number in range(200)]

with psycopg.connect(**where, autocommit=True) as listener, psycopg.connect(**where, autocommit=True) as speaker:
    listener.execute(f"listen {table}")
    for number in range(20):
        speaker.execute("select pg_notify(%s, %s)", (table, f"note {number}"))
    notes = [note.payload for note in listener.notifies(timeout=20, stop_after=20)]
    assert sorted(notes) == sorted(f"note {number}" for number in range(20)), notes
print("ok")
