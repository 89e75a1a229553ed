/* catalogue: names and aliases of collections to their numbers, in LMDB.
 *
 * A cache: everything in it is in the MANIFEST of the data directory too, and it is thrown away
 * whenever there is doubt. LMDB has no checksums, so a data file is opened only when the seal
 * beside it, written at the last clean close, has its length and digests and was made from this
 * MANIFEST; otherwise the file is deleted unread. The seal is removed before the data file is
 * opened: a process that dies leaves none.
 *
 * The directory has one owner (the data directory's lock). One thread at a time. */
#ifndef ANND_STORAGE_CATALOGUE_H
#define ANND_STORAGE_CATALOGUE_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

#define CATALOGUE_UUID_BYTES 16u
/* Bytes of a database's name plus bytes of a collection's name or alias: LMDB's keys hold 511. */
#define CATALOGUE_KEY_MAX 510u

struct catalogue;

struct catalogue_entry {
    const char *database;
    const char *name;
    uint64_t number;
    bool alias;
};

struct catalogue_stats {
    uint64_t name_count;
    uint64_t alias_count;
    uint64_t data_bytes; /* of data.mdb */
    uint64_t map_bytes;  /* reserved addresses, no memory */
};

/* Opens the catalogue in the directory `path`, made if missing. With *empty set nothing could be
 * taken over, for the reason in `reason` (256 bytes; "" when there was no catalogue at all), and
 * the caller must fill it with catalogue_replace. */
int catalogue_open(struct vfs *vfs, const char *path, const uint8_t uuid[CATALOGUE_UUID_BYTES],
                   uint64_t generation, struct catalogue **out, bool *empty, char reason[256],
                   struct error *err);
/* generation > 0: writes the seal for that generation of the MANIFEST. 0, or failure: no seal, the
 * next open starts afresh. NULL is accepted. */
int catalogue_close(struct catalogue *catalogue, uint64_t generation, struct error *err);

/* Makes the catalogue hold exactly these entries, in one transaction. */
int catalogue_replace(struct catalogue *catalogue, const struct catalogue_entry *entries,
                      uint32_t count, struct error *err);
/* Removes the first list, then puts the second, in one transaction. Removing what is not there is
 * no error. */
int catalogue_change(struct catalogue *catalogue, const struct catalogue_entry *removed,
                     uint32_t removed_count, const struct catalogue_entry *put, uint32_t put_count,
                     struct error *err);

/* Names come before aliases. ERR_NOT_FOUND; ERR_IO for what LMDB reports. */
int catalogue_find(struct catalogue *catalogue, const char *database, const char *name,
                   uint64_t *number, bool *alias, struct error *err);
int catalogue_stats_get(struct catalogue *catalogue, struct catalogue_stats *stats,
                        struct error *err);

#endif
