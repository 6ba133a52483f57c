-- A file of 0.1.0 (layout 1) with messages in flight, delayed, in FIFO groups and dead, and keys: tests/process/test_layouts.py.
PRAGMA application_id = 1936814960;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE clocks (boot TEXT PRIMARY KEY, shift INTEGER NOT NULL, last INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "clocks" VALUES('00000000-0000-0000-0000-000000000001',1795923824592,1795961713826);
CREATE TABLE garbage (queue INTEGER PRIMARY KEY);
CREATE TABLE groups (
        id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, name TEXT NOT NULL, ready_at INTEGER NOT NULL,
        head INTEGER NOT NULL, UNIQUE (queue, name)
    );
INSERT INTO "groups" VALUES(1,7,'g',1795965314030,17);
CREATE TABLE keys (
        queue INTEGER NOT NULL, hop TEXT NOT NULL, stream INTEGER, expires INTEGER, PRIMARY KEY (queue, hop)
    ) WITHOUT ROWID;
INSERT INTO "keys" VALUES(3,'14dc7ef4a92d3144081ec9452bd60ff69bba1dd60e368ce2a5d0aa856f0252d5',NULL,NULL);
INSERT INTO "keys" VALUES(3,'1eaabaebf16fcd8817c3ef05c9481d3278628264735d36db653435e2a579f336',NULL,NULL);
INSERT INTO "keys" VALUES(3,'52d339d7babc0feb8ba88f7f2f6e246ffc3f793664c486ddf645bcf9dd807312',NULL,NULL);
INSERT INTO "keys" VALUES(3,'54bc8d05dc1bc2050ce756f9b91e6fdb1321d32f5ceb105597496e6a8aef5ab5',NULL,NULL);
INSERT INTO "keys" VALUES(3,'81cd181cbc1601baca1fdc50fb2ae659f916370955acff9dc49943c3f9deaff3',NULL,NULL);
INSERT INTO "keys" VALUES(3,'90cd2a358e086399962ae8c902782859865dd097d44bffb0adc8766d37b0bcc6',NULL,NULL);
INSERT INTO "keys" VALUES(3,'b5964dd45c868ae9c6f83045aa358ece1a9c7705dfdb8b6429987da75af1e211',NULL,NULL);
INSERT INTO "keys" VALUES(3,'df9707c5d17a8b2dcf9e8046f2f0c89c66e6df3b0ad58ced10508068f4328655',NULL,NULL);
INSERT INTO "keys" VALUES(3,'e4f1d6540764675765dcc2c0d6a2a815a4f8821a985d66ce03bca5b387ad6442',NULL,NULL);
INSERT INTO "keys" VALUES(3,'f20f75f78224d7dbf73600a0d3bf27660a56ed9f83404f1865d49d505b4f26cc',NULL,NULL);
CREATE TABLE messages (
        seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, visible_at INTEGER NOT NULL, receives INTEGER NOT NULL,
        charges INTEGER NOT NULL, streamed INTEGER NOT NULL, sent_at INTEGER NOT NULL, grp INTEGER,
        first_sent_at INTEGER, hop TEXT, origin TEXT, source TEXT, failure TEXT, body TEXT NOT NULL
    );
INSERT INTO "messages" VALUES(9,3,1795965314028,1,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"4","hop":"e4f1d6540764675765dcc2c0d6a2a815a4f8821a985d66ce03bca5b387ad6442"},"value":4}');
INSERT INTO "messages" VALUES(10,3,1795965314028,1,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"5","hop":"54bc8d05dc1bc2050ce756f9b91e6fdb1321d32f5ceb105597496e6a8aef5ab5"},"value":5}');
INSERT INTO "messages" VALUES(11,3,1795965314028,1,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"6","hop":"f20f75f78224d7dbf73600a0d3bf27660a56ed9f83404f1865d49d505b4f26cc"},"value":6}');
INSERT INTO "messages" VALUES(12,3,1795961714023,0,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"7","hop":"df9707c5d17a8b2dcf9e8046f2f0c89c66e6df3b0ad58ced10508068f4328655"},"value":7}');
INSERT INTO "messages" VALUES(13,3,1795961714023,0,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"8","hop":"14dc7ef4a92d3144081ec9452bd60ff69bba1dd60e368ce2a5d0aa856f0252d5"},"value":8}');
INSERT INTO "messages" VALUES(14,3,1795961714023,0,0,0,1795961714023,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"9","hop":"81cd181cbc1601baca1fdc50fb2ae659f916370955acff9dc49943c3f9deaff3"},"value":9}');
INSERT INTO "messages" VALUES(15,3,1795962614026,0,0,0,1795961714026,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"1826b36f636a4dec903a0faec2dc5517","hop":"ded511751018589a079e083caa9cdfe3470417217d1b0abf1f7e65d49e3cd41d"},"value":20}');
INSERT INTO "messages" VALUES(16,3,1795962614026,0,0,0,1795961714026,NULL,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"233352705a5348fba8155b905f3e8ecc","hop":"b3d986ef743a111403c9088744038f400cba3b409cb97093921ae6916a1a2911"},"value":21}');
INSERT INTO "messages" VALUES(17,7,1795965314030,1,0,0,1795961714029,1,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"7cb2289aef5b4dd5b3b57a9e216f4ae2","hop":"89c5dc141ff9f34f41ec711784dc2a1914ac8d9e896639330b0348747382225e"},"value":1}');
INSERT INTO "messages" VALUES(18,7,1795961714029,0,0,0,1795961714029,1,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"33ca890eb4344bedb4da50b74fb85f5b","hop":"616cd5e5efdcf452bca7ff5e4e8761af09b40966c294fb73e69cc25af70395d2"},"value":2}');
INSERT INTO "messages" VALUES(19,7,1795961714029,0,0,0,1795961714029,1,NULL,NULL,NULL,NULL,NULL,'{"meta":{"priority":0,"id":"7e3cb021b4e64756b54fbd3c47bbf230","hop":"fb2deed716b3b52b5cb34dc55562e3aa928316fca6f46720c6d42b79198cd0cd"},"value":3}');
INSERT INTO "messages" VALUES(22,9,1795961714058,0,0,0,1795961714058,NULL,1795961714033,'202b5bf7738f30119aa95bcd8c546dff8e103126131efbb254d0baf8567476b1','857cd50d1c72d105dacf886440a3ede6fe2dfd2c2984e7e587af0b0db12332fc','dead--input','{"error":"Reject","text":"seven","traceback":"Traceback (most recent call last):\n  File \"/srv/pipeline.py\", line 7, in double\n    if v == 7: raise Reject(\"seven\")\n               ^^^^^^^^^^^^^^^^^^^^^\nsqspipes_mp.errors.Reject: seven\n","stage":"double","attempts":1,"signal":null,"stack":"","host":"vm","pid":26187,"first_seen":1795961714.0336354,"failed_at":1795961714.0577912,"source":"dead--input"}','{"meta":{"priority":0,"id":"1bb7803b7ac84a698b4c82f6549cb7f9","hop":"857cd50d1c72d105dacf886440a3ede6fe2dfd2c2984e7e587af0b0db12332fc"},"value":7}');
CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1), token TEXT NOT NULL, generation INTEGER NOT NULL,
        next_seq INTEGER NOT NULL
    );
INSERT INTO "meta" VALUES(1,'1a41bef04a9333bb',12,24);
CREATE TABLE queues (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, fifo INTEGER NOT NULL, visibility REAL NOT NULL, dead TEXT,
        created_at INTEGER NOT NULL, retention INTEGER NOT NULL
    );
INSERT INTO "queues" VALUES(1,'old-double--dead',0,60.0,NULL,1795961713826,1209600000);
INSERT INTO "queues" VALUES(2,'old-tell--dead',0,60.0,NULL,1795961713826,1209600000);
INSERT INTO "queues" VALUES(3,'old--input',0,60.0,'old-double--dead',1795961713826,1209600000);
INSERT INTO "queues" VALUES(4,'old-double',0,60.0,'old-tell--dead',1795961713826,1209600000);
INSERT INTO "queues" VALUES(5,'oldf-double--dead.fifo',1,60.0,NULL,1795961714029,1209600000);
INSERT INTO "queues" VALUES(6,'oldf-tell--dead.fifo',1,60.0,NULL,1795961714029,1209600000);
INSERT INTO "queues" VALUES(7,'oldf--input.fifo',1,60.0,'oldf-double--dead.fifo',1795961714029,1209600000);
INSERT INTO "queues" VALUES(8,'oldf-double.fifo',1,60.0,'oldf-tell--dead.fifo',1795961714029,1209600000);
INSERT INTO "queues" VALUES(9,'dead-double--dead',0,60.0,NULL,1795961714033,1209600000);
INSERT INTO "queues" VALUES(10,'dead-tell--dead',0,60.0,NULL,1795961714033,1209600000);
INSERT INTO "queues" VALUES(11,'dead--input',0,60.0,'dead-double--dead',1795961714033,1209600000);
INSERT INTO "queues" VALUES(12,'dead-double',0,60.0,'dead-tell--dead',1795961714033,1209600000);
CREATE TABLE streams (seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, expires INTEGER);
CREATE INDEX due ON messages (queue, visible_at, receives);
CREATE INDEX turn ON messages (grp) WHERE grp IS NOT NULL;
CREATE INDEX ready ON groups (queue, ready_at, head);
CREATE INDEX keys_expires ON keys (expires) WHERE expires IS NOT NULL;
CREATE INDEX keys_stream ON keys (stream) WHERE stream IS NOT NULL;
CREATE INDEX streams_expires ON streams (expires) WHERE expires IS NOT NULL;
COMMIT;
