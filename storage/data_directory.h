/* data_directory: the folder a server owns.
 *
 *   LOCK              flock held for the life of the process
 *   MANIFEST          the truth: which collections there are (MANIFEST.1: the generation before)
 *   collections/N/    one index directory each; a number is never used twice
 *   catalogue/        LMDB, a cache of MANIFEST: names and aliases to numbers
 *
 * What is in the folder and unknown is reported and left alone. Opening never fails for the sake of
 * the catalogue, and never for a collection that is damaged. One thread at a time: the caller's
 * lock guards everything but data_directory_path and data_directory_uuid. */
#ifndef ANND_STORAGE_DATA_DIRECTORY_H
#define ANND_STORAGE_DATA_DIRECTORY_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/catalogue.h"
#include "storage/file.h"
#include "storage/vfs.h"

#define DATA_NAME_MAX 255u   /* bytes of a database's or collection's name, or of an alias */
#define DATA_ALIAS_MAX 4096u /* of one collection */
#define DATA_DESCRIPTION_MAX 65536u
#define DATA_DATABASE_DEFAULT "default"

struct data_directory;

/* When handed out: borrowed, until the next change or close. When handed in: copied. */
struct data_collection {
    uint64_t number; /* from 1 */
    const char *name;
    const char *database;    /* NULL or "" is DATA_DATABASE_DEFAULT */
    const char *description; /* NULL is "" */
    const char *const *aliases;
    uint32_t alias_count;
    bool load;           /* to be loaded at start */
    uint64_t created_ms; /* since 1970 */
};

/* `create`: a folder that is missing or empty becomes a data directory. ERR_NOT_FOUND when there is
 * none; ERR_BUSY when another process holds the lock; ERR_CORRUPT when MANIFEST and MANIFEST.1 are
 * both damaged; ERR_UNSUPPORTED for one of a newer annd. */
int data_directory_open(struct vfs *vfs, const char *path, bool create, struct data_directory **out,
                        struct error *err);
/* Seals the catalogue and lets go of the lock. NULL is accepted. */
void data_directory_close(struct data_directory *dd);

/* What opening and later calls met and got over: sentences for the log, owned by dd. */
uint32_t data_directory_warning_count(const struct data_directory *dd);
const char *data_directory_warning(const struct data_directory *dd, uint32_t i);

const char *data_directory_path(const struct data_directory *dd);
const uint8_t *data_directory_uuid(const struct data_directory *dd); /* CATALOGUE_UUID_BYTES */
uint64_t data_directory_generation(const struct data_directory *dd);

/* Collections by ascending number. */
uint32_t data_directory_count(const struct data_directory *dd);
const struct data_collection *data_directory_at(const struct data_directory *dd, uint32_t i);
/* NULL when there is none. */
const struct data_collection *data_directory_get(const struct data_directory *dd, uint64_t number);
/* By name or alias, through the catalogue. `database` as in struct data_collection. NULL when there
 * is none. */
const struct data_collection *data_directory_find(struct data_directory *dd, const char *database,
                                                  const char *name);

/* A number larger than every one used or seen in the folder, not handed out before. It is taken for
 * good when data_directory_add() names it. */
uint64_t data_directory_new_number(struct data_directory *dd);
/* "<path>/collections/<number>". Build or attach into that plus ".tmp", then rename: a leftover
 * .tmp of a number that was never added is removed at the next open. */
int data_directory_collection_path(const struct data_directory *dd, uint64_t number,
                                   char out[FILE_PATH_MAX], struct error *err);

/* Each publishes MANIFEST, then updates the catalogue. On failure nothing has changed; if that
 * cannot be told (the disk failed in the middle), every later change is refused.
 * add: number from data_directory_new_number, its folder is there and synced. ERR_EXISTS when the
 * name or an alias is taken; ERR_INVALID; ERR_NOT_FOUND when there is no such folder.
 * update: the collection of that number gets the new name, aliases, description and load.
 * remove: the folder stays, the caller deletes it when nobody reads it any more. */
int data_directory_add(struct data_directory *dd, const struct data_collection *collection,
                       struct error *err);
int data_directory_update(struct data_directory *dd, const struct data_collection *collection,
                          struct error *err);
int data_directory_remove(struct data_directory *dd, uint64_t number, struct error *err);

/* Throws the catalogue away and makes it anew from MANIFEST. */
int data_directory_rebuild_catalogue(struct data_directory *dd, struct error *err);
/* ERR_NOT_FOUND while there is no usable catalogue. */
int data_directory_catalogue_stats(struct data_directory *dd, struct catalogue_stats *stats,
                                   struct error *err);

#endif
