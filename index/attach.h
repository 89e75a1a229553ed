/* attach: an index directory becomes a collection of a data directory.
 *
 * Its files are linked or copied into collections/N.tmp, made durable, verified there, and only
 * then renamed and named by the data directory's MANIFEST. A crash at any point leaves the index
 * where it was and a data directory that opens: with the collection, or without. */
#ifndef ANND_INDEX_ATTACH_H
#define ANND_INDEX_ATTACH_H

#include <stdbool.h>
#include <stdint.h>

#include "index/index_directory.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/vfs.h"

enum attach_mode {
    ATTACH_LINK, /* hard links: the index stays usable, both share their bytes */
    ATTACH_COPY, /* a second copy, on any file system */
    ATTACH_MOVE  /* hard links, or a copy where they cannot be; then the index is removed */
};

struct attach_result {
    uint64_t number; /* of the collection */
    uint64_t row_count;
    uint64_t bytes;
    uint32_t file_count;
    bool copied;       /* bytes were copied, not linked */
    bool source_left;  /* ATTACH_MOVE: attached, but the index could not be removed whole */
    uint32_t warnings; /* of the data directory, reported through `warn` */
    struct index_check check;
};

/* Names of collections as the wire contract wants them (its section 3.1): 1 to 255 of A-Z a-z 0-9
 * _, the first no digit. ERR_INVALID says what is wrong. */
int attach_name_check(const char *name, struct error *err);

/* Attaches the index directory `path` to the data directory `data`, which is made when it is
 * missing. `warn` (may be NULL) is told what opening the data directory got over. ERR_INVALID: the
 * name, or a file that cannot be linked; ERR_EXISTS: a collection or alias of that name; ERR_BUSY:
 * somebody holds the data directory; ERR_UNSUPPORTED: ATTACH_LINK across file systems;
 * ERR_NOT_FOUND, ERR_CORRUPT as index_directory_check(); ERR_NO_SPACE; ERR_CANCELLED. On failure
 * nothing is left in `data` but, if it was made, itself. One thread. */
int attach_index(struct vfs *vfs, const char *path, const char *data, const char *name,
                 enum attach_mode mode, struct job *job, void (*warn)(const char *sentence),
                 struct attach_result *result, struct error *err);

#endif
