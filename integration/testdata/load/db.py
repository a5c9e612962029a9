# A database on the container's writable layer: rows with check sums go in, and
# all of them are read back.
import hashlib, os, sqlite3, sys

def say(line):
    print(line, flush=True)

os.makedirs("/var/db", exist_ok=True)
db = sqlite3.connect("/var/db/load.sqlite")
db.execute("create table if not exists t (id integer primary key, data blob, sum text)")
n = 0
while True:
    try:
        for _ in range(20):
            data = os.urandom(4096)
            db.execute("insert into t (data, sum) values (?, ?)", (data, hashlib.sha256(data).hexdigest()))
        db.commit()
        n += 20
        if n > 2000:
            db.execute("delete from t")
            db.commit()
            n = 0
        for data, sum in db.execute("select data, sum from t"):
            if hashlib.sha256(data).hexdigest() != sum:
                say("WRONG: a row has another check sum")
        if db.execute("pragma quick_check").fetchone()[0] != "ok":
            say("WRONG: the database is damaged")
        say("OK")
    except Exception as e:
        say("FAILED: %r" % e)
