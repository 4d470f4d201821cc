BEGIN TRANSACTION;
CREATE TABLE asks (
    market TEXT NOT NULL, month TEXT NOT NULL, attempts INTEGER NOT NULL, asked_at TEXT NOT NULL, parked_at TEXT,
    reason TEXT NOT NULL, PRIMARY KEY (market, month));
INSERT INTO "asks" VALUES('binance:BTC-USDT','2024-01-01',1,'2024-01-10T00:00:00Z',NULL,'missing');
CREATE TABLE beats (
    name TEXT PRIMARY KEY, at TEXT NOT NULL);
INSERT INTO "beats" VALUES('daemon','2024-01-10T00:00:00Z');
CREATE TABLE fetches (
    id INTEGER PRIMARY KEY, tbl TEXT NOT NULL, market TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    asked_at REAL NOT NULL, seconds REAL NOT NULL, outcome TEXT NOT NULL, status INTEGER, rows INTEGER, error TEXT);
INSERT INTO "fetches" VALUES(1,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-07T00:00:00Z','2024-01-07T16:39:00Z',1.79519323498727226252e+09,1.93452230014372617006e-02,'answered',200,999,NULL);
INSERT INTO "fetches" VALUES(2,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-07T16:37:00Z','2024-01-08T09:17:00Z',1.79519323499035739896e+09,3.61613140012195799499e-02,'answered',200,920,NULL);
INSERT INTO "fetches" VALUES(3,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-08T09:15:00Z','2024-01-09T00:01:00Z',1.7951932349944739342e+09,3.37478149995149578899e-02,'answered',200,886,NULL);
INSERT INTO "fetches" VALUES(4,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-08T01:59:00Z','2024-01-08T03:21:00Z',1.79519323508458089827e+09,7.49525900027947500348e-03,'answered',200,2,NULL);
CREATE TABLE gaps (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, start TEXT NOT NULL, "end" TEXT NOT NULL,
    bars INTEGER NOT NULL, reason TEXT NOT NULL, answers INTEGER NOT NULL, evidence TEXT NOT NULL,
    PRIMARY KEY (tbl, market, start));
INSERT INTO "gaps" VALUES('raw/ohlcv_1m','binance:BTC-USDT','2024-01-01','2024-01-08T02:00:00Z','2024-01-08T03:20:00Z',80,'no_bars',2,'asked [2024-01-07T16:37:00Z, 2024-01-08T09:17:00Z) at 2026-11-20T16:47:14Z, 920 rows; asked [2024-01-08T01:59:00Z, 2024-01-08T03:21:00Z) at 2026-11-20T16:47:15Z, 2 rows');
CREATE TABLE incidents (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, severity TEXT NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL,
    opened_at TEXT NOT NULL, recovered_at TEXT);
INSERT INTO "incidents" VALUES(1,'k','warning','t','b','2024-01-10T00:00:00Z',NULL);
CREATE TABLE letters (
    id INTEGER PRIMARY KEY, incident INTEGER NOT NULL, event TEXT NOT NULL, channel TEXT NOT NULL,
    sent_at TEXT, tries INTEGER NOT NULL DEFAULT 0, error TEXT,
    UNIQUE (incident, event, channel));
INSERT INTO "letters" VALUES(1,1,'opened','file',NULL,0,NULL);
CREATE TABLE markets (
    market TEXT PRIMARY KEY, listed TEXT NOT NULL, evidence TEXT NOT NULL);
INSERT INTO "markets" VALUES('binance:BTC-USDT','2020-01-01T00:00:00Z','first bar of 1m, told twice');
CREATE TABLE partitions (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL,
    start TEXT NOT NULL, through TEXT NOT NULL, newest TEXT, complete INTEGER NOT NULL, rows INTEGER NOT NULL,
    bytes INTEGER, digest TEXT, rolled TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, error TEXT,
    account TEXT, updated_at TEXT NOT NULL,
    PRIMARY KEY (tbl, market, month));
INSERT INTO "partitions" VALUES('raw/ohlcv_1m','binance:BTC-USDT','2024-01-01','2024-01-07T00:00:00Z','2024-01-09T00:00:00Z','2024-01-08T23:59:00Z',1,2800,75903,'b73b19610a282a5e71def7cb44ee1b436f3d88e0ff6d74da3e37e50474b50a26','b73b19610a282a5e71def7cb44ee1b436f3d88e0ff6d74da3e37e50474b50a26',1,0,NULL,'{"received": 2806, "stored": 2800, "identical": 6, "quarantined": 0}','2024-01-10T00:00:00Z');
CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY, tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, open_time TEXT,
    reasons TEXT NOT NULL, fields TEXT NOT NULL, source TEXT NOT NULL, fetch_id BIGINT, seen INTEGER NOT NULL DEFAULT 1,
    first_seen TEXT NOT NULL, last_seen TEXT NOT NULL, content TEXT NOT NULL,
    UNIQUE (tbl, market, month, content));
INSERT INTO "quarantine" VALUES(1,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-01','2024-01-08T00:00:00Z','high_low','{"high": "1"}','binance',1,3,'2024-01-10T00:00:00Z','2024-01-10T00:00:00Z','57d42b35f48585e4b8bf73a88f9da4da4f42091a6f677aaba26a7b4b538208b4');
INSERT INTO "quarantine" VALUES(2,'raw/ohlcv_1m','binance:BTC-USDT','2024-01-01',NULL,'high_low','{"high": "1"}','binance',1,3,'2024-01-10T00:00:00Z','2024-01-10T00:00:00Z','31ecca5e7affb7e20e7f2d28367a2bf1077417c63bc75fed43cb072f80c03bb4');
CREATE TABLE red_checks (
    tbl TEXT NOT NULL, market TEXT NOT NULL, month TEXT NOT NULL, name TEXT NOT NULL, blocking INTEGER NOT NULL,
    says TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, since TEXT NOT NULL, PRIMARY KEY (tbl, market, month, name));
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO "schema_version" VALUES(2);
CREATE TABLE venues (
    venue TEXT PRIMARY KEY, next_at REAL NOT NULL DEFAULT 0, paused_until REAL NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, opened INTEGER NOT NULL DEFAULT 0, broken_until REAL NOT NULL DEFAULT 0);
INSERT INTO "venues" VALUES('binance',0.0,123.5,0,0,0.0);
CREATE INDEX fetches_by_market ON fetches (market, asked_at);
CREATE UNIQUE INDEX incidents_open ON incidents (key) WHERE recovered_at IS NULL;
COMMIT;
