/* How it works: two LMDB databases, "names" and "aliases", map "<database>\0<name>" to a u64. LMDB
 * maps its file into memory and trusts every byte of it, so everything here is about not opening a
 * file that is not exactly what a clean close left behind: see open_sealed().
 *
 * No MDB_WRITEMAP: with it a full disk is a SIGBUS. No MDB_NOSYNC: the seal vouches for bytes that
 * must be on the disk. lock.mdb is mapped and trusted too; it says nothing that outlives a process,
 * so it is removed before every open. Reads use one transaction that is reset and renewed. */
#include "storage/catalogue.h"

#include <errno.h>
#include <inttypes.h>
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/base/digest.h"
#include "storage/file.h"
#include "storage/format.h"

#define MAP_BYTES_START ((uint64_t)64 << 20)
#define MAP_BYTES_MAX ((uint64_t)64 << 30)
#define FILE_MODE 0640
#define READ_BYTES (1u << 20)

struct catalogue {
    struct vfs *vfs;
    char path[FILE_PATH_MAX];
    char data_path[FILE_PATH_MAX];
    char lock_path[FILE_PATH_MAX];
    char seal_path[FILE_PATH_MAX];
    uint8_t uuid[CATALOGUE_UUID_BYTES];
    MDB_env *env;
    MDB_dbi names;
    MDB_dbi aliases;
    MDB_txn *reading; /* reset between reads; NULL until the first */
    uint64_t map_bytes;
};

static int lmdb_error(struct error *err, const struct catalogue *catalogue, int rc,
                      const char *what)
{
    if (rc > 0)
        return error_set_errno(err, rc, "%s: %s", catalogue->data_path, what);
    return error_set(err, ERR_IO, "%s: %s: %s", catalogue->data_path, what, mdb_strerror(rc));
}

static int data_digest(const struct catalogue *catalogue, uint64_t *bytes, uint32_t *crc,
                       uint8_t sha256[DIGEST_BYTES], struct error *err)
{
    struct vfs_file *file = file_open(catalogue->vfs, catalogue->data_path, VFS_READ, err);
    struct digest *digest = digest_new();
    uint8_t *buffer = malloc(READ_BYTES);
    int rc = -1;

    *crc = 0;
    if (!file || file_size(file, catalogue->data_path, bytes, err) < 0)
        goto done;
    if (!digest || !buffer) {
        error_set(err, ERR_NOMEM, "%s: no memory to check it", catalogue->data_path);
        goto done;
    }
    for (uint64_t at = 0; at < *bytes;) {
        uint64_t part = *bytes - at < READ_BYTES ? *bytes - at : READ_BYTES;

        if (file_read_exact(file, catalogue->data_path, buffer, part, at, err) < 0)
            goto done;
        *crc = crc32c(*crc, buffer, part);
        digest_update(digest, buffer, part);
        at += part;
    }
    rc = 0;
done:
    if (digest)
        digest_finish(digest, sha256);
    free(buffer);
    file_close(file, catalogue->data_path, NULL);
    return rc;
}

/* True when the seal is whole and vouches for data.mdb as it is; else the cause is in `why`. */
static bool seal_holds(const struct catalogue *catalogue, uint64_t generation, struct error *why)
{
    struct catalogue_seal seal;
    uint8_t sha256[DIGEST_BYTES];
    uint8_t *data = NULL;
    uint64_t data_bytes;
    uint32_t crc;
    size_t bytes;
    bool holds = false;

    if (!file_exists(catalogue->vfs, catalogue->seal_path)) {
        error_set(why, ERR_NOT_FOUND, "there is no seal: it was not closed cleanly");
        goto done;
    }
    if (file_read_whole(catalogue->vfs, catalogue->seal_path, sizeof seal, &data, &bytes, why) < 0)
        goto done;
    if (bytes != sizeof seal) {
        error_set(why, ERR_CORRUPT, "the seal has %zu bytes, wanted %zu", bytes, sizeof seal);
        goto done;
    }
    memcpy(&seal, data, sizeof seal);
    crc = seal.crc32c;
    seal.crc32c = 0;
    if (memcmp(seal.magic, CATALOGUE_SEAL_MAGIC, sizeof seal.magic) != 0 ||
        seal.version != CATALOGUE_SEAL_VERSION || crc32c(0, &seal, sizeof seal) != crc) {
        error_set(why, ERR_CORRUPT, "the seal is damaged or of another version");
        goto done;
    }
    if (seal.generation != generation || memcmp(seal.uuid, catalogue->uuid, sizeof seal.uuid)) {
        error_set(why, ERR_CORRUPT, "the seal belongs to another MANIFEST");
        goto done;
    }
    if (data_digest(catalogue, &data_bytes, &crc, sha256, why) < 0)
        goto done;
    if (data_bytes != seal.data_bytes || crc != seal.data_crc32c ||
        memcmp(sha256, seal.data_sha256, DIGEST_BYTES) != 0) {
        error_set(why, ERR_CORRUPT, "data.mdb is not the file that was sealed");
        goto done;
    }
    holds = true;
done:
    free(data);
    return holds;
}

static int open_databases(struct catalogue *catalogue, struct error *err)
{
    MDB_txn *txn = NULL;
    int rc = mdb_txn_begin(catalogue->env, NULL, 0, &txn);

    if (rc == 0)
        rc = mdb_dbi_open(txn, "names", MDB_CREATE, &catalogue->names);
    if (rc == 0)
        rc = mdb_dbi_open(txn, "aliases", MDB_CREATE, &catalogue->aliases);
    if (rc == 0) {
        rc = mdb_txn_commit(txn);
        txn = NULL;
    }
    if (txn)
        mdb_txn_abort(txn);
    return rc == 0 ? 0 : lmdb_error(err, catalogue, rc, "cannot open its databases");
}

static int open_env(struct catalogue *catalogue, struct error *err)
{
    struct vfs_stat st = {0};
    int rc;

    if (catalogue->vfs->stat(catalogue->vfs, catalogue->data_path, &st) < 0)
        st.bytes = 0;
    catalogue->map_bytes = MAP_BYTES_START;
    while (catalogue->map_bytes < MAP_BYTES_MAX && catalogue->map_bytes / 2 < st.bytes)
        catalogue->map_bytes *= 2;
    rc = mdb_env_create(&catalogue->env);
    if (rc == 0)
        rc = mdb_env_set_maxdbs(catalogue->env, 4);
    if (rc == 0)
        rc = mdb_env_set_mapsize(catalogue->env, catalogue->map_bytes);
    if (rc == 0)
        rc = mdb_env_open(catalogue->env, catalogue->path, MDB_NOTLS, FILE_MODE);
    if (rc != 0)
        return lmdb_error(err, catalogue, rc, "cannot open");
    return open_databases(catalogue, err);
}

/* Removes the seal before anything else: from here on only a clean close can make the file good. */
static int break_seal(struct catalogue *catalogue, struct error *err)
{
    if (file_remove_all(catalogue->vfs, catalogue->seal_path, err) < 0 ||
        file_remove_all(catalogue->vfs, catalogue->lock_path, err) < 0)
        return -1;
    return file_dirsync(catalogue->vfs, catalogue->path, err);
}

static void close_env(struct catalogue *catalogue)
{
    if (catalogue->reading)
        mdb_txn_abort(catalogue->reading);
    catalogue->reading = NULL;
    if (catalogue->env)
        mdb_env_close(catalogue->env);
    catalogue->env = NULL;
}

/* Opens what a clean close left behind, or nothing. */
static int open_sealed(struct catalogue *catalogue, uint64_t generation, struct error *why)
{
    if (!seal_holds(catalogue, generation, why) || break_seal(catalogue, why) < 0)
        return -1;
    if (open_env(catalogue, why) < 0) {
        close_env(catalogue);
        return -1;
    }
    return 0;
}

int catalogue_open(struct vfs *vfs, const char *path, const uint8_t uuid[CATALOGUE_UUID_BYTES],
                   uint64_t generation, struct catalogue **out, bool *empty, char reason[256],
                   struct error *err)
{
    struct catalogue *catalogue = calloc(1, sizeof *catalogue);
    struct error why = ERROR_INIT;
    int rc = -1;

    reason[0] = 0;
    if (!catalogue) {
        error_set(err, ERR_NOMEM, "%s: no memory for the catalogue", path);
        goto done;
    }
    catalogue->vfs = vfs;
    memcpy(catalogue->uuid, uuid, sizeof catalogue->uuid);
    if (file_path_join(catalogue->path, path, "", err) < 0 ||
        file_path_join(catalogue->data_path, path, "data.mdb", err) < 0 ||
        file_path_join(catalogue->lock_path, path, "lock.mdb", err) < 0 ||
        file_path_join(catalogue->seal_path, path, "SEAL", err) < 0)
        goto done;
    if (!file_exists(vfs, path) && file_mkdir(vfs, path, err) < 0)
        goto done;
    *empty = false;
    if (open_sealed(catalogue, generation, &why) < 0) {
        *empty = true;
        if (file_exists(vfs, catalogue->data_path))
            snprintf(reason, 256, "%.255s", why.message);
        if (break_seal(catalogue, err) < 0 || file_remove_all(vfs, catalogue->data_path, err) < 0 ||
            open_env(catalogue, err) < 0)
            goto done;
    }
    *out = catalogue;
    catalogue = NULL;
    rc = 0;
done:
    catalogue_close(catalogue, 0, NULL);
    return rc;
}

static int write_seal(struct catalogue *catalogue, uint64_t generation, struct error *err)
{
    struct catalogue_seal seal;

    memset(&seal, 0, sizeof seal);
    memcpy(seal.magic, CATALOGUE_SEAL_MAGIC, sizeof seal.magic);
    seal.version = CATALOGUE_SEAL_VERSION;
    seal.generation = generation;
    memcpy(seal.uuid, catalogue->uuid, sizeof seal.uuid);
    if (data_digest(catalogue, &seal.data_bytes, &seal.data_crc32c, seal.data_sha256, err) < 0)
        return -1;
    seal.crc32c = crc32c(0, &seal, sizeof seal);
    return file_publish(catalogue->vfs, catalogue->seal_path, &seal, sizeof seal, err);
}

int catalogue_close(struct catalogue *catalogue, uint64_t generation, struct error *err)
{
    bool was_open;
    int rc = 0;

    if (!catalogue)
        return 0;
    was_open = catalogue->env != NULL;
    close_env(catalogue);
    if (was_open && generation > 0)
        rc = write_seal(catalogue, generation, err);
    if (was_open)
        file_remove_all(catalogue->vfs, catalogue->lock_path, NULL);
    free(catalogue);
    return rc;
}

/* "<database>\0<name>" into key, which has CATALOGUE_KEY_MAX + 1 bytes. */
static int make_key(const char *database, const char *name, char *key, MDB_val *out,
                    struct error *err)
{
    size_t database_bytes = strlen(database);
    size_t name_bytes = strlen(name);

    if (database_bytes + name_bytes > CATALOGUE_KEY_MAX)
        return error_set(err, ERR_INVALID, "%.64s / %.64s: the names have more than %u bytes",
                         database, name, CATALOGUE_KEY_MAX);
    memcpy(key, database, database_bytes + 1);
    memcpy(key + database_bytes + 1, name, name_bytes);
    out->mv_data = key;
    out->mv_size = database_bytes + 1 + name_bytes;
    return 0;
}

struct change {
    bool clear;
    const struct catalogue_entry *removed;
    uint32_t removed_count;
    const struct catalogue_entry *put;
    uint32_t put_count;
};

/* 0, an LMDB code, or -1 with err set (no LMDB code is -1). */
static int apply(struct catalogue *catalogue, MDB_txn *txn, const struct change *change,
                 struct error *err)
{
    char text[CATALOGUE_KEY_MAX + 1];
    MDB_val key;
    int rc = 0;

    if (change->clear) {
        rc = mdb_drop(txn, catalogue->names, 0);
        if (rc == 0)
            rc = mdb_drop(txn, catalogue->aliases, 0);
    }
    for (uint32_t i = 0; rc == 0 && i < change->removed_count; i++) {
        const struct catalogue_entry *entry = &change->removed[i];

        if (make_key(entry->database, entry->name, text, &key, err) < 0)
            return -1;
        rc = mdb_del(txn, entry->alias ? catalogue->aliases : catalogue->names, &key, NULL);
        if (rc == MDB_NOTFOUND)
            rc = 0;
    }
    for (uint32_t i = 0; rc == 0 && i < change->put_count; i++) {
        const struct catalogue_entry *entry = &change->put[i];
        uint8_t number[8];
        MDB_val value = {sizeof number, number};

        if (make_key(entry->database, entry->name, text, &key, err) < 0)
            return -1;
        store_u64(number, entry->number);
        rc = mdb_put(txn, entry->alias ? catalogue->aliases : catalogue->names, &key, &value, 0);
    }
    return rc;
}

/* One transaction; when the map is full it is begun again in one of twice the size. */
static int transact(struct catalogue *catalogue, const struct change *change, struct error *err)
{
    for (;;) {
        MDB_txn *txn = NULL;
        int rc = mdb_txn_begin(catalogue->env, NULL, 0, &txn);

        if (rc == 0)
            rc = apply(catalogue, txn, change, err);
        if (rc == 0) {
            rc = mdb_txn_commit(txn);
            txn = NULL;
        }
        if (txn)
            mdb_txn_abort(txn);
        if (rc == 0)
            return 0;
        if (rc == -1)
            return -1;
        if (rc != MDB_MAP_FULL || catalogue->map_bytes >= MAP_BYTES_MAX)
            return lmdb_error(err, catalogue, rc, "cannot write");
        /* The map may only move while no transaction looks at it. */
        if (catalogue->reading)
            mdb_txn_abort(catalogue->reading);
        catalogue->reading = NULL;
        catalogue->map_bytes *= 2;
        rc = mdb_env_set_mapsize(catalogue->env, catalogue->map_bytes);
        if (rc != 0)
            return lmdb_error(err, catalogue, rc, "cannot grow its map");
    }
}

int catalogue_replace(struct catalogue *catalogue, const struct catalogue_entry *entries,
                      uint32_t count, struct error *err)
{
    struct change change = {.clear = true, .put = entries, .put_count = count};

    return transact(catalogue, &change, err);
}

int catalogue_change(struct catalogue *catalogue, const struct catalogue_entry *removed,
                     uint32_t removed_count, const struct catalogue_entry *put, uint32_t put_count,
                     struct error *err)
{
    struct change change = {
        .removed = removed, .removed_count = removed_count, .put = put, .put_count = put_count};

    return transact(catalogue, &change, err);
}

static int begin_reading(struct catalogue *catalogue, struct error *err)
{
    int rc;

    if (catalogue->reading)
        rc = mdb_txn_renew(catalogue->reading);
    else
        rc = mdb_txn_begin(catalogue->env, NULL, MDB_RDONLY, &catalogue->reading);
    return rc == 0 ? 0 : lmdb_error(err, catalogue, rc, "cannot read");
}

int catalogue_find(struct catalogue *catalogue, const char *database, const char *name,
                   uint64_t *number, bool *alias, struct error *err)
{
    char text[CATALOGUE_KEY_MAX + 1];
    MDB_val key, value;
    int rc;

    if (make_key(database, name, text, &key, err) < 0 || begin_reading(catalogue, err) < 0)
        return -1;
    *alias = false;
    rc = mdb_get(catalogue->reading, catalogue->names, &key, &value);
    if (rc == MDB_NOTFOUND) {
        *alias = true;
        rc = mdb_get(catalogue->reading, catalogue->aliases, &key, &value);
    }
    if (rc == 0 && value.mv_size == 8)
        *number = load_u64(value.mv_data);
    else if (rc == 0)
        rc = MDB_CORRUPTED;
    mdb_txn_reset(catalogue->reading);
    if (rc == MDB_NOTFOUND)
        return error_set(err, ERR_NOT_FOUND, "database %s has no collection or alias %s", database,
                         name);
    return rc == 0 ? 0 : lmdb_error(err, catalogue, rc, "cannot read");
}

int catalogue_stats_get(struct catalogue *catalogue, struct catalogue_stats *stats,
                        struct error *err)
{
    struct vfs_stat st;
    MDB_stat names, aliases;
    int rc;

    if (file_stat(catalogue->vfs, catalogue->data_path, &st, err) < 0 ||
        begin_reading(catalogue, err) < 0)
        return -1;
    rc = mdb_stat(catalogue->reading, catalogue->names, &names);
    if (rc == 0)
        rc = mdb_stat(catalogue->reading, catalogue->aliases, &aliases);
    mdb_txn_reset(catalogue->reading);
    if (rc != 0)
        return lmdb_error(err, catalogue, rc, "cannot read");
    stats->name_count = names.ms_entries;
    stats->alias_count = aliases.ms_entries;
    stats->data_bytes = st.bytes;
    stats->map_bytes = catalogue->map_bytes;
    return 0;
}
