/* How it works: the MANIFEST is kept decoded, and beside it a sorted array of what it says about
 * collections. A change is made to a copy of the manifest, the copy is published, and only then it
 * becomes the one in memory; the catalogue follows. The catalogue answers lookups by name, its
 * answers are compared with the array, and where it fails or disagrees it is dropped (without a
 * seal, so the next open rebuilds it) and the array is searched instead.
 *
 * Numbers: next_number in MANIFEST is above every collection ever listed; in memory it is also
 * above every number seen in the folder. Only add() makes it durable, so a folder "N.tmp" with N at
 * or above the durable one belongs to an attach that never finished, and nobody can miss it.
 *
 * A MANIFEST that is damaged is put aside and MANIFEST.1 takes its place under a generation of its
 * own, never one that was used: what was sealed or expected for the lost one must not match. */
#include "storage/data_directory.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "storage/base/bytes.h"
#include "storage/manifest.h"

#define EPOCH 1u
#define NUMBER_MAX ((uint64_t)1 << 53) /* folders with larger names are none of ours */
#define WARNING_MAX 1000u              /* a folder full of junk must not fill the log */

struct data_directory {
    struct vfs *vfs;
    char path[FILE_PATH_MAX];
    char manifest_path[FILE_PATH_MAX];
    char collections_path[FILE_PATH_MAX];
    char catalogue_path[FILE_PATH_MAX];
    struct vfs_file *lock;
    struct manifest *manifest;
    uint8_t uuid[CATALOGUE_UUID_BYTES];
    uint64_t generation;
    uint64_t next_durable; /* what MANIFEST says */
    uint64_t next_number;  /* >= next_durable, above all seen */
    struct data_collection *collections;
    uint32_t collection_count;
    struct catalogue *catalogue; /* NULL: unusable, the array is searched */
    bool recovered;              /* from MANIFEST.1 */
    bool refuses_changes;        /* MANIFEST on disk and in memory may differ */
    char **warnings;
    uint32_t warning_count;
};

static void warn(struct data_directory *dd, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Out of memory loses the warning, not the work. */
static void warn(struct data_directory *dd, const char *format, ...)
{
    char **warnings;
    char *text = NULL;
    va_list args;
    int length;

    if (dd->warning_count >= WARNING_MAX)
        return;
    va_start(args, format);
    length = vasprintf(&text, format, args);
    va_end(args);
    if (length < 0)
        return;
    warnings = realloc(dd->warnings, (dd->warning_count + 1) * sizeof *warnings);
    if (!warnings) {
        free(text);
        return;
    }
    dd->warnings = warnings;
    dd->warnings[dd->warning_count++] = text;
}

static const char *database_of(const char *database)
{
    return database && database[0] ? database : DATA_DATABASE_DEFAULT;
}

/* What MANIFEST says, decoded. */
struct contents {
    struct manifest *manifest;
    uint8_t uuid[CATALOGUE_UUID_BYTES];
    uint64_t generation;
    uint64_t next_number;
    struct data_collection *collections;
    uint32_t count;
};

static void collections_free(struct data_collection *collections, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        free((void *)collections[i].aliases); /* the texts belong to the manifest */
    free(collections);
}

static void contents_release(struct contents *contents)
{
    collections_free(contents->collections, contents->count);
    manifest_free(contents->manifest);
    memset(contents, 0, sizeof *contents);
}

/* The number in "<prefix><number>", up to what follows the digits. Canonical: no leading zero. */
static bool parse_number(const char *text, uint64_t *number, const char **rest)
{
    uint64_t value = 0;
    const char *at = text;

    if (*at < '1' || *at > '9')
        return false;
    for (; *at >= '0' && *at <= '9'; at++) {
        value = value * 10 + (uint64_t)(*at - '0');
        if (value > NUMBER_MAX)
            return false;
    }
    *number = value;
    *rest = at;
    return true;
}

static void entry_name(char out[96], uint64_t number, const char *what)
{
    snprintf(out, 96, "collection.%" PRIu64 ".%s", number, what);
}

static void alias_name(char out[96], uint64_t number, uint32_t i)
{
    snprintf(out, 96, "collection.%" PRIu64 ".alias.%" PRIu32, number, i);
}

static bool label_is_valid(const char *text, size_t bytes_max)
{
    size_t bytes = strlen(text);

    if (bytes == 0 || bytes > bytes_max)
        return false;
    for (size_t i = 0; i < bytes; i++) {
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            return false;
    }
    return true;
}

static int decode_collection(const struct manifest *manifest, struct data_collection *collection,
                             const char *where, struct error *err)
{
    uint64_t number = collection->number, load;
    uint32_t alias_count = 0;
    const char **aliases = NULL;
    char entry[96];

    entry_name(entry, number, "name");
    if (manifest_get_text(manifest, entry, &collection->name, err) < 0)
        return -1;
    entry_name(entry, number, "database");
    if (manifest_get_text(manifest, entry, &collection->database, err) < 0)
        return -1;
    entry_name(entry, number, "description");
    if (manifest_get_text(manifest, entry, &collection->description, err) < 0)
        return -1;
    entry_name(entry, number, "created");
    if (manifest_get_u64(manifest, entry, &collection->created_ms, err) < 0)
        return -1;
    entry_name(entry, number, "load");
    if (manifest_get_u64_in(manifest, entry, 0, 1, &load, err) < 0)
        return -1;
    collection->load = load == 1;
    for (;; alias_count++) {
        alias_name(entry, number, alias_count);
        if (!manifest_has(manifest, entry))
            break;
        if (alias_count == DATA_ALIAS_MAX)
            return error_set(err, ERR_CORRUPT,
                             "%s: collection %" PRIu64 " has more than %u aliases", where, number,
                             DATA_ALIAS_MAX);
    }
    if (alias_count > 0) {
        aliases = calloc(alias_count, sizeof *aliases);
        if (!aliases)
            return error_set(err, ERR_NOMEM, "%s: no memory", where);
    }
    collection->aliases = aliases;
    collection->alias_count = alias_count;
    for (uint32_t i = 0; i < alias_count; i++) {
        alias_name(entry, number, i);
        if (manifest_get_text(manifest, entry, &aliases[i], err) < 0)
            return -1;
        if (!label_is_valid(aliases[i], DATA_NAME_MAX))
            return error_set(err, ERR_CORRUPT, "%s: entry %s is no possible alias", where, entry);
    }
    if (!label_is_valid(collection->name, DATA_NAME_MAX) ||
        !label_is_valid(collection->database, DATA_NAME_MAX))
        return error_set(err, ERR_CORRUPT,
                         "%s: collection %" PRIu64 " has no possible name or database", where,
                         number);
    return 0;
}

static int order_collections(const void *a, const void *b)
{
    const struct data_collection *x = a, *y = b;

    return x->number < y->number ? -1 : x->number > y->number;
}

/* True for "collection.<number>.name". */
static bool is_name_entry(const char *name, uint64_t *number)
{
    static const char prefix[] = "collection.";
    const char *rest;

    return strncmp(name, prefix, sizeof prefix - 1) == 0 &&
           parse_number(name + sizeof prefix - 1, number, &rest) && strcmp(rest, ".name") == 0;
}

/* Takes over the manifest, also on failure. */
static int contents_decode(struct manifest *manifest, const char *where, struct contents *out,
                           struct error *err)
{
    struct contents contents = {.manifest = manifest};
    uint64_t unused, number;
    const uint8_t *uuid;
    uint32_t room = 0;
    size_t uuid_bytes;
    int rc = -1;

    if (manifest_get_u64_in(manifest, "generation", 1, UINT64_MAX - 2, &contents.generation, err) <
            0 ||
        manifest_get_u64_in(manifest, "epoch", EPOCH, EPOCH, &unused, err) < 0 ||
        manifest_get_u64_in(manifest, "shard", 0, 0, &unused, err) < 0 ||
        manifest_get_u64_in(manifest, "next_number", 1, NUMBER_MAX, &contents.next_number, err) <
            0 ||
        manifest_get_bytes(manifest, "uuid", &uuid, &uuid_bytes, err) < 0)
        goto done;
    if (uuid_bytes != CATALOGUE_UUID_BYTES) {
        error_set(err, ERR_CORRUPT, "%s: the uuid has %zu bytes, wanted %u", where, uuid_bytes,
                  CATALOGUE_UUID_BYTES);
        goto done;
    }
    memcpy(contents.uuid, uuid, uuid_bytes);
    for (uint32_t i = 0; i < manifest_count(manifest); i++)
        room += is_name_entry(manifest_entry(manifest, i, NULL, 0), &number);
    contents.collections = calloc(room + 1, sizeof *contents.collections);
    if (!contents.collections) {
        error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu32 " collections", where, room);
        goto done;
    }
    for (uint32_t i = 0; i < manifest_count(manifest); i++) {
        if (!is_name_entry(manifest_entry(manifest, i, NULL, 0), &number))
            continue;
        if (number >= contents.next_number) {
            error_set(err, ERR_CORRUPT,
                      "%s: collection %" PRIu64 " is not below next_number %" PRIu64, where, number,
                      contents.next_number);
            goto done;
        }
        contents.collections[contents.count].number = number;
        contents.count++;
        if (decode_collection(manifest, &contents.collections[contents.count - 1], where, err) < 0)
            goto done;
    }
    qsort(contents.collections, contents.count, sizeof *contents.collections, order_collections);
    *out = contents;
    memset(&contents, 0, sizeof contents);
    rc = 0;
done:
    contents_release(&contents);
    return rc;
}

static int contents_read(struct vfs *vfs, const char *path, struct contents *out, struct error *err)
{
    struct manifest *manifest = NULL;

    if (manifest_read(vfs, MANIFEST_DATA, path, &manifest, err) < 0)
        return -1;
    return contents_decode(manifest, path, out, err);
}

/* Makes `contents` what dd holds; contents is left empty. */
static void contents_install(struct data_directory *dd, struct contents *contents)
{
    collections_free(dd->collections, dd->collection_count);
    manifest_free(dd->manifest);
    dd->manifest = contents->manifest;
    dd->collections = contents->collections;
    dd->collection_count = contents->count;
    memcpy(dd->uuid, contents->uuid, sizeof dd->uuid);
    dd->generation = contents->generation;
    dd->next_durable = contents->next_number;
    if (dd->next_number < contents->next_number)
        dd->next_number = contents->next_number;
    memset(contents, 0, sizeof *contents);
}

/* Entries that may stand in a folder that is to become a data directory: what a start that died
 * half-way, or a file system's own root, leaves there. */
static bool is_harmless_at_creation(const char *name)
{
    static const char *const names[] = {"LOCK", "MANIFEST.tmp", "collections", "catalogue",
                                        "lost+found"};

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(name, names[i]) == 0)
            return true;
    }
    return false;
}

/* A folder with something in it is not made a data directory: it is somebody's mistake, or one
 * whose MANIFEST is lost. */
static int check_free_for_creation(struct data_directory *dd, struct error *err)
{
    char **names = NULL;
    uint32_t count = 0;
    int rc = -1;

    if (file_list(dd->vfs, dd->path, &names, &count, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_harmless_at_creation(names[i])) {
            error_set(err, ERR_EXISTS,
                      "%s: no MANIFEST here, and the folder is not empty: it has %s", dd->path,
                      names[i]);
            error_remedy(err, "name an empty folder, or one that is not there yet");
            goto done;
        }
    }
    if (file_exists(dd->vfs, dd->collections_path)) {
        file_names_free(names, count);
        names = NULL;
        count = 0;
        if (file_list(dd->vfs, dd->collections_path, &names, &count, err) < 0)
            goto done;
        if (count > 0) {
            error_set(err, ERR_CORRUPT,
                      "%s: MANIFEST and MANIFEST.1 are gone, but %s has %" PRIu32 " entries",
                      dd->path, dd->collections_path, count);
            error_remedy(err, "restore MANIFEST from a copy");
            goto done;
        }
    }
    rc = 0;
done:
    file_names_free(names, count);
    return rc;
}

static int create_manifest(struct data_directory *dd, struct error *err)
{
    struct manifest *manifest = NULL;
    struct contents contents = {0};
    uint8_t uuid[CATALOGUE_UUID_BYTES];
    int rc = -1;

    if (check_free_for_creation(dd, err) < 0)
        goto done;
    manifest = manifest_new(MANIFEST_DATA);
    if (!manifest) {
        error_set(err, ERR_NOMEM, "%s: no memory", dd->path);
        goto done;
    }
    if (getrandom(uuid, sizeof uuid, 0) != (ssize_t)sizeof uuid) {
        error_set_errno(err, errno, "%s: cannot get random bytes", dd->path);
        goto done;
    }
    if (manifest_set_u64(manifest, "epoch", EPOCH, err) < 0 ||
        manifest_set_u64(manifest, "shard", 0, err) < 0 ||
        manifest_set_u64(manifest, "next_number", 1, err) < 0 ||
        manifest_set_bytes(manifest, "uuid", uuid, sizeof uuid, err) < 0 ||
        manifest_publish(dd->vfs, dd->manifest_path, 0, manifest, err) != MANIFEST_DONE)
        goto done;
    rc = contents_decode(manifest, dd->manifest_path, &contents, err);
    manifest = NULL;
    if (rc == 0)
        contents_install(dd, &contents);
done:
    manifest_free(manifest);
    return rc;
}

/* MANIFEST is damaged or gone and MANIFEST.1 is whole: it becomes MANIFEST again. The damaged file
 * stays as MANIFEST.damaged. */
static int install_previous(struct data_directory *dd, struct contents *previous,
                            const struct error *cause, struct error *err)
{
    char damaged[FILE_PATH_MAX];
    uint8_t *data = NULL;
    size_t bytes = 0;
    int rc = -1;

    if (file_path_join(damaged, dd->path, "MANIFEST.damaged", err) < 0 ||
        manifest_set_u64(previous->manifest, "generation.parent", previous->generation, err) < 0 ||
        manifest_set_u64(previous->manifest, "generation", previous->generation + 2, err) < 0 ||
        manifest_encode(previous->manifest, &data, &bytes, err) < 0)
        goto done;
    /* Dying between the two leaves no MANIFEST, which the next open treats like a damaged one. */
    if (file_exists(dd->vfs, dd->manifest_path) &&
        file_rename(dd->vfs, dd->manifest_path, damaged, err) < 0)
        goto done;
    if (file_publish(dd->vfs, dd->manifest_path, data, bytes, err) < 0)
        goto done;
    warn(dd,
         "%s; went back to MANIFEST.1, generation %" PRIu64
         ": the last change to the list of collections may be missing",
         cause->message, previous->generation);
    previous->generation += 2;
    contents_install(dd, previous);
    dd->recovered = true;
    rc = 0;
done:
    free(data);
    return rc;
}

static int read_manifest(struct data_directory *dd, bool create, struct error *err)
{
    struct error cause = ERROR_INIT, previous_cause = ERROR_INIT;
    struct contents contents = {0};
    char previous[FILE_PATH_MAX];
    int rc = -1;

    if (contents_read(dd->vfs, dd->manifest_path, &contents, &cause) == 0) {
        contents_install(dd, &contents);
        return 0;
    }
    if (cause.code != ERR_CORRUPT && cause.code != ERR_NOT_FOUND)
        return error_set(err, cause.code, "%s", cause.message);
    if (file_path_join(previous, dd->path, "MANIFEST.1", err) < 0)
        return -1;
    if (contents_read(dd->vfs, previous, &contents, &previous_cause) == 0) {
        rc = install_previous(dd, &contents, &cause, err);
        goto done;
    }
    if (cause.code == ERR_NOT_FOUND && previous_cause.code == ERR_NOT_FOUND) {
        if (create)
            return create_manifest(dd, err);
        error_set(err, ERR_NOT_FOUND, "%s is no data directory: it has no MANIFEST", dd->path);
        goto done;
    }
    if (cause.code == ERR_CORRUPT && previous_cause.code == ERR_NOT_FOUND)
        error_set(err, ERR_CORRUPT, "%s, and there is no MANIFEST.1", cause.message);
    else
        error_set(err, previous_cause.code, "%.400s; %.400s", cause.message,
                  previous_cause.message);
    error_remedy(err, "restore %s from a copy", dd->manifest_path);
done:
    contents_release(&contents);
    return rc;
}

static const struct data_collection *by_number(const struct data_directory *dd, uint64_t number)
{
    struct data_collection key = {.number = number};

    if (dd->collection_count == 0)
        return NULL;
    return bsearch(&key, dd->collections, dd->collection_count, sizeof key, order_collections);
}

/* One entry of collections/. */
static void scan_entry(struct data_directory *dd, const char *name)
{
    char path[FILE_PATH_MAX];
    struct error err = ERROR_INIT;
    const char *rest;
    uint64_t number;

    if (file_path_join(path, dd->collections_path, name, &err) < 0) {
        warn(dd, "%s", err.message);
        return;
    }
    if (!parse_number(name, &number, &rest) || number >= NUMBER_MAX) {
        warn(dd, "%s: unknown, left alone", path);
        return;
    }
    if (number >= dd->next_number)
        dd->next_number = number + 1;
    if (*rest == 0) {
        if (!by_number(dd, number))
            warn(dd, "%s: no collection of this number is listed, left alone", path);
    } else if (strcmp(rest, ".tmp") != 0) {
        warn(dd, "%s: unknown, left alone", path);
    } else if (number < dd->next_durable || dd->recovered) {
        warn(dd, "%s: left over from an unfinished job, left alone", path);
    } else if (file_remove_all(dd->vfs, path, &err) < 0) {
        warn(dd, "%s: left over from an unfinished attach, cannot be removed: %s", path,
             err.message);
    } else {
        warn(dd, "%s: left over from an unfinished attach, removed", path);
    }
}

static int scan(struct data_directory *dd, struct error *err)
{
    char **names = NULL;
    uint32_t count = 0;
    int rc = -1;

    if (!file_exists(dd->vfs, dd->collections_path) &&
        (file_mkdir(dd->vfs, dd->collections_path, err) < 0 ||
         file_dirsync(dd->vfs, dd->path, err) < 0))
        goto done;
    if (file_list(dd->vfs, dd->collections_path, &names, &count, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++)
        scan_entry(dd, names[i]);
    for (uint32_t i = 0; i < dd->collection_count; i++) {
        char path[FILE_PATH_MAX];

        if (data_directory_collection_path(dd, dd->collections[i].number, path, err) < 0)
            goto done;
        if (!file_exists(dd->vfs, path))
            warn(dd, "%s: the folder of collection %s is missing", path, dd->collections[i].name);
    }
    rc = 0;
done:
    file_names_free(names, count);
    return rc;
}

static int take_lock(struct data_directory *dd, struct error *err)
{
    char path[FILE_PATH_MAX];
    int rc;

    if (file_path_join(path, dd->path, "LOCK", err) < 0)
        return -1;
    dd->lock = file_open(dd->vfs, path, VFS_WRITE | VFS_OPEN_OR_CREATE, err);
    if (!dd->lock)
        return -1;
    rc = dd->vfs->lock(dd->lock);
    if (rc == -EWOULDBLOCK)
        return error_set(err, ERR_BUSY, "another annd process holds %s", path);
    return rc < 0 ? error_set_errno(err, rc, "%s: cannot lock", path) : 0;
}

static int make_folder(struct data_directory *dd, struct error *err)
{
    char folder[FILE_PATH_MAX];

    if (file_mkdir(dd->vfs, dd->path, err) < 0)
        return -1;
    file_path_folder(folder, dd->path);
    return file_dirsync(dd->vfs, folder, err);
}

/* Looks before it locks: opening something that is no data directory must leave no LOCK there. */
static int check_folder(struct data_directory *dd, bool create, struct error *err)
{
    struct error stat_err = ERROR_INIT;
    char previous[FILE_PATH_MAX];
    struct vfs_stat st;

    if (file_stat(dd->vfs, dd->path, &st, &stat_err) < 0) {
        if (stat_err.code == ERR_NOT_FOUND && create)
            return make_folder(dd, err);
        return error_set(err, stat_err.code, "%s", stat_err.message);
    }
    if (st.kind != VFS_DIRECTORY)
        return error_set(err, ERR_INVALID, "%s is no folder", dd->path);
    if (file_exists(dd->vfs, dd->manifest_path))
        return 0;
    if (file_path_join(previous, dd->path, "MANIFEST.1", err) < 0)
        return -1;
    if (file_exists(dd->vfs, previous))
        return 0;
    if (create)
        return check_free_for_creation(dd, err);
    return error_set(err, ERR_NOT_FOUND, "%s is no data directory: it has no MANIFEST", dd->path);
}

static void drop_catalogue(struct data_directory *dd, const char *cause)
{
    warn(dd, "%s: not used until it is rebuilt: %s", dd->catalogue_path, cause);
    catalogue_close(dd->catalogue, 0, NULL);
    dd->catalogue = NULL;
}

static uint32_t entry_count(const struct data_collection *collection)
{
    return 1 + collection->alias_count;
}

/* Name and aliases of one collection into entries[entry_count()]. */
static void fill_entries(const struct data_collection *collection, struct catalogue_entry *entries)
{
    entries[0] =
        (struct catalogue_entry){collection->database, collection->name, collection->number, false};
    for (uint32_t i = 0; i < collection->alias_count; i++)
        entries[1 + i] = (struct catalogue_entry){collection->database, collection->aliases[i],
                                                  collection->number, true};
}

static int fill_catalogue(struct data_directory *dd, struct error *err)
{
    struct catalogue_entry *entries;
    uint64_t room = 1;
    uint32_t count = 0;
    int rc;

    for (uint32_t i = 0; i < dd->collection_count; i++)
        room += entry_count(&dd->collections[i]);
    entries = calloc(room, sizeof *entries);
    if (!entries)
        return error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu64 " entries",
                         dd->catalogue_path, room);
    for (uint32_t i = 0; i < dd->collection_count; i++) {
        fill_entries(&dd->collections[i], entries + count);
        count += entry_count(&dd->collections[i]);
    }
    rc = catalogue_replace(dd->catalogue, entries, count, err);
    free(entries);
    return rc;
}

/* generation 0 matches no seal and so begins afresh. */
static int open_catalogue(struct data_directory *dd, uint64_t generation, struct error *err)
{
    char reason[256];
    bool empty;

    if (catalogue_open(dd->vfs, dd->catalogue_path, dd->uuid, generation, &dd->catalogue, &empty,
                       reason, err) < 0)
        return -1;
    if (!empty)
        return 0;
    if (reason[0] && generation > 0)
        warn(dd, "%s: rebuilt from MANIFEST: %s", dd->catalogue_path, reason);
    if (fill_catalogue(dd, err) < 0) {
        catalogue_close(dd->catalogue, 0, NULL);
        dd->catalogue = NULL;
        return -1;
    }
    return 0;
}

int data_directory_open(struct vfs *vfs, const char *path, bool create, struct data_directory **out,
                        struct error *err)
{
    struct data_directory *dd = calloc(1, sizeof *dd);
    struct error catalogue_err = ERROR_INIT;
    size_t path_bytes = strlen(path);
    int rc = -1;

    if (!dd) {
        error_set(err, ERR_NOMEM, "%s: no memory for a data directory", path);
        goto done;
    }
    dd->vfs = vfs;
    while (path_bytes > 1 && path[path_bytes - 1] == '/')
        path_bytes--;
    if (path_bytes == 0 || path_bytes >= FILE_PATH_MAX) {
        error_set(err, ERR_INVALID, "\"%.100s\" cannot be the path of a data directory", path);
        goto done;
    }
    memcpy(dd->path, path, path_bytes);
    if (file_path_join(dd->manifest_path, dd->path, "MANIFEST", err) < 0 ||
        file_path_join(dd->collections_path, dd->path, "collections", err) < 0 ||
        file_path_join(dd->catalogue_path, dd->path, "catalogue", err) < 0 ||
        check_folder(dd, create, err) < 0 || take_lock(dd, err) < 0 ||
        read_manifest(dd, create, err) < 0 || scan(dd, err) < 0)
        goto done;
    if (open_catalogue(dd, dd->generation, &catalogue_err) < 0)
        warn(dd, "%s: not used until it is rebuilt: %s", dd->catalogue_path, catalogue_err.message);
    *out = dd;
    dd = NULL;
    rc = 0;
done:
    data_directory_close(dd);
    return rc;
}

void data_directory_close(struct data_directory *dd)
{
    if (!dd)
        return;
    /* A seal that cannot be written costs a rebuild. One for a MANIFEST that may not be the one on
     * the disk must not be. */
    catalogue_close(dd->catalogue, dd->refuses_changes ? 0 : dd->generation, NULL);
    collections_free(dd->collections, dd->collection_count);
    manifest_free(dd->manifest);
    for (uint32_t i = 0; i < dd->warning_count; i++)
        free(dd->warnings[i]);
    free(dd->warnings);
    file_close(dd->lock, "LOCK", NULL); /* last: it covers all of the above */
    free(dd);
}

uint32_t data_directory_warning_count(const struct data_directory *dd)
{
    return dd->warning_count;
}

const char *data_directory_warning(const struct data_directory *dd, uint32_t i)
{
    return i < dd->warning_count ? dd->warnings[i] : NULL;
}

const char *data_directory_path(const struct data_directory *dd)
{
    return dd->path;
}

const uint8_t *data_directory_uuid(const struct data_directory *dd)
{
    return dd->uuid;
}

uint64_t data_directory_generation(const struct data_directory *dd)
{
    return dd->generation;
}

uint32_t data_directory_count(const struct data_directory *dd)
{
    return dd->collection_count;
}

const struct data_collection *data_directory_at(const struct data_directory *dd, uint32_t i)
{
    return i < dd->collection_count ? &dd->collections[i] : NULL;
}

const struct data_collection *data_directory_get(const struct data_directory *dd, uint64_t number)
{
    return by_number(dd, number);
}

/* Has the collection this name, or this alias? */
static bool answers_to(const struct data_collection *collection, const char *database,
                       const char *name)
{
    if (strcmp(collection->database, database) != 0)
        return false;
    if (strcmp(collection->name, name) == 0)
        return true;
    for (uint32_t i = 0; i < collection->alias_count; i++) {
        if (strcmp(collection->aliases[i], name) == 0)
            return true;
    }
    return false;
}

/* The way without the catalogue. */
static const struct data_collection *search(const struct data_directory *dd, const char *database,
                                            const char *name)
{
    for (uint32_t i = 0; i < dd->collection_count; i++) {
        if (answers_to(&dd->collections[i], database, name))
            return &dd->collections[i];
    }
    return NULL;
}

const struct data_collection *data_directory_find(struct data_directory *dd, const char *database,
                                                  const char *name)
{
    const struct data_collection *found;
    struct error err = ERROR_INIT;
    uint64_t number;
    bool alias;

    database = database_of(database);
    if (!label_is_valid(database, DATA_NAME_MAX) || !label_is_valid(name, DATA_NAME_MAX))
        return NULL; /* nothing can have such a name */
    if (!dd->catalogue)
        return search(dd, database, name);
    if (catalogue_find(dd->catalogue, database, name, &number, &alias, &err) < 0) {
        if (err.code == ERR_NOT_FOUND)
            return NULL;
        drop_catalogue(dd, err.message);
        return search(dd, database, name);
    }
    found = by_number(dd, number);
    if (!found || !answers_to(found, database, name)) {
        drop_catalogue(dd, "it names a collection that MANIFEST does not");
        return search(dd, database, name);
    }
    return found;
}

uint64_t data_directory_new_number(struct data_directory *dd)
{
    return dd->next_number++;
}

int data_directory_collection_path(const struct data_directory *dd, uint64_t number,
                                   char out[FILE_PATH_MAX], struct error *err)
{
    char name[32];

    snprintf(name, sizeof name, "%" PRIu64, number);
    return file_path_join(out, dd->collections_path, name, err);
}

/* A copy to change; unknown entries come along. */
static struct manifest *copy_manifest(const struct data_directory *dd, struct error *err)
{
    struct manifest *copy = NULL;
    uint8_t *data = NULL;
    size_t bytes = 0;

    if (manifest_encode(dd->manifest, &data, &bytes, err) == 0)
        manifest_decode(MANIFEST_DATA, data, bytes, dd->manifest_path, &copy, err);
    free(data);
    return copy;
}

/* Takes out what an update will write again; entries of later versions stay. */
static void remove_known_entries(struct manifest *manifest,
                                 const struct data_collection *collection)
{
    static const char *const known[] = {"name", "database", "description", "created", "load"};
    char entry[96];

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        entry_name(entry, collection->number, known[i]);
        manifest_remove(manifest, entry);
    }
    for (uint32_t i = 0; i < collection->alias_count; i++) {
        alias_name(entry, collection->number, i);
        manifest_remove(manifest, entry);
    }
}

static void remove_all_entries(struct manifest *manifest, uint64_t number)
{
    char prefix[96];
    size_t prefix_bytes;
    uint32_t i = 0;

    entry_name(prefix, number, "");
    prefix_bytes = strlen(prefix);
    while (i < manifest_count(manifest)) {
        const char *name = manifest_entry(manifest, i, NULL, 0);
        char copy[MANIFEST_NAME_MAX + 1];

        if (strncmp(name, prefix, prefix_bytes) != 0) {
            i++;
            continue;
        }
        snprintf(copy, sizeof copy, "%s", name); /* the name goes with its entry */
        manifest_remove(manifest, copy);
    }
}

static int set_entries(struct manifest *manifest, const struct data_collection *collection,
                       struct error *err)
{
    uint64_t number = collection->number;
    char entry[96];

    entry_name(entry, number, "name");
    if (manifest_set_text(manifest, entry, collection->name, err) < 0)
        return -1;
    entry_name(entry, number, "database");
    if (manifest_set_text(manifest, entry, database_of(collection->database), err) < 0)
        return -1;
    entry_name(entry, number, "description");
    if (manifest_set_text(manifest, entry, collection->description ? collection->description : "",
                          err) < 0)
        return -1;
    entry_name(entry, number, "created");
    if (manifest_set_u64(manifest, entry, collection->created_ms, err) < 0)
        return -1;
    entry_name(entry, number, "load");
    if (manifest_set_u64(manifest, entry, collection->load, err) < 0)
        return -1;
    for (uint32_t i = 0; i < collection->alias_count; i++) {
        alias_name(entry, number, i);
        if (manifest_set_text(manifest, entry, collection->aliases[i], err) < 0)
            return -1;
    }
    return 0;
}

static int check_label(const char *what, const char *text, struct error *err)
{
    if (!label_is_valid(text, DATA_NAME_MAX))
        return error_set(err, ERR_INVALID,
                         "%s \"%.64s\" must have 1 to %u bytes and no control characters", what,
                         text, DATA_NAME_MAX);
    return 0;
}

/* Is the name free for collection `number`? */
static int check_free(const struct data_directory *dd, uint64_t number, const char *database,
                      const char *name, struct error *err)
{
    const struct data_collection *holder = search(dd, database, name);

    if (holder && holder->number != number)
        return error_set(err, ERR_EXISTS, "database %s has %s %s already (collection %" PRIu64 ")",
                         database, strcmp(holder->name, name) == 0 ? "a collection" : "an alias",
                         name, holder->number);
    return 0;
}

static int check_collection(const struct data_directory *dd,
                            const struct data_collection *collection, struct error *err)
{
    const char *database = database_of(collection->database);

    if (check_label("collection name", collection->name, err) < 0 ||
        check_label("database name", database, err) < 0 ||
        check_free(dd, collection->number, database, collection->name, err) < 0)
        return -1;
    if (collection->alias_count > DATA_ALIAS_MAX)
        return error_set(err, ERR_INVALID, "%" PRIu32 " aliases, at most %u are allowed",
                         collection->alias_count, DATA_ALIAS_MAX);
    if (collection->description && strlen(collection->description) > DATA_DESCRIPTION_MAX)
        return error_set(err, ERR_INVALID, "the description has more than %u bytes",
                         DATA_DESCRIPTION_MAX);
    for (uint32_t i = 0; i < collection->alias_count; i++) {
        if (check_label("alias", collection->aliases[i], err) < 0 ||
            check_free(dd, collection->number, database, collection->aliases[i], err) < 0)
            return -1;
        if (strcmp(collection->aliases[i], collection->name) == 0)
            return error_set(err, ERR_EXISTS, "collection %s cannot be its own alias",
                             collection->name);
        for (uint32_t j = 0; j < i; j++) {
            if (strcmp(collection->aliases[i], collection->aliases[j]) == 0)
                return error_set(err, ERR_INVALID, "alias %s is given twice",
                                 collection->aliases[i]);
        }
    }
    return 0;
}

/* The publish failed on the way. If MANIFEST is as it was, nothing happened and work goes on;
 * otherwise nobody can say what a restart will find, and nothing more may be built on it. */
static void settle_unknown(struct data_directory *dd)
{
    struct contents now = {0};

    if (contents_read(dd->vfs, dd->manifest_path, &now, NULL) < 0 ||
        now.generation != dd->generation) {
        dd->refuses_changes = true;
        warn(dd, "%s: a change failed in the middle; no more changes until a restart",
             dd->manifest_path);
    }
    contents_release(&now);
}

/* The catalogue follows: out with what `before` had, in with what `after` has (either may be
 * NULL). Its failure is no failure of the change. */
static void follow(struct data_directory *dd, const struct data_collection *before,
                   const struct data_collection *after)
{
    uint32_t removed = before ? entry_count(before) : 0;
    uint32_t put = after ? entry_count(after) : 0;
    struct catalogue_entry *entries;
    struct error err = ERROR_INIT;

    if (!dd->catalogue)
        return;
    entries = calloc((size_t)removed + put + 1, sizeof *entries);
    if (!entries) {
        drop_catalogue(dd, "no memory");
        return;
    }
    if (before)
        fill_entries(before, entries);
    if (after)
        fill_entries(after, entries + removed);
    if (catalogue_change(dd->catalogue, entries, removed, entries + removed, put, &err) < 0)
        drop_catalogue(dd, err.message);
    free(entries);
}

/* Publishes MANIFEST with collection `number` set to `after`, or removed when that is NULL. */
static int change(struct data_directory *dd, uint64_t number, const struct data_collection *after,
                  struct error *err)
{
    const struct data_collection *before = by_number(dd, number);
    struct manifest *manifest = NULL;
    struct contents next = {0}, old = {0};
    enum manifest_outcome outcome;
    int rc = -1;

    if (dd->refuses_changes) {
        error_set(err, ERR_IO, "%s: an earlier change failed in the middle; a restart will tell",
                  dd->manifest_path);
        goto done;
    }
    manifest = copy_manifest(dd, err);
    if (!manifest)
        goto done;
    if (!after)
        remove_all_entries(manifest, number);
    else if (before)
        remove_known_entries(manifest, before);
    if (after && set_entries(manifest, after, err) < 0)
        goto done;
    if (number >= dd->next_durable &&
        manifest_set_u64(manifest, "next_number", number + 1, err) < 0)
        goto done;
    /* Decoded before it is published: what could not be read back must not be written. */
    if (manifest_set_u64(manifest, "generation", dd->generation + 1, err) < 0 ||
        contents_decode(manifest, dd->manifest_path, &next, err) < 0) {
        manifest = NULL;
        goto done;
    }
    manifest = NULL;
    outcome = manifest_publish(dd->vfs, dd->manifest_path, dd->generation, next.manifest, err);
    if (outcome == MANIFEST_UNKNOWN)
        settle_unknown(dd);
    if (outcome == MANIFEST_CONFLICT)
        dd->refuses_changes = true; /* somebody wrote it in spite of the lock */
    if (outcome != MANIFEST_DONE)
        goto done;
    /* `before` points into the old contents, which therefore live until the catalogue followed. */
    old.manifest = dd->manifest;
    old.collections = dd->collections;
    old.count = dd->collection_count;
    dd->manifest = NULL;
    dd->collections = NULL;
    dd->collection_count = 0;
    contents_install(dd, &next);
    follow(dd, before, by_number(dd, number));
    rc = 0;
done:
    contents_release(&old);
    contents_release(&next);
    manifest_free(manifest);
    return rc;
}

int data_directory_add(struct data_directory *dd, const struct data_collection *collection,
                       struct error *err)
{
    char path[FILE_PATH_MAX];
    struct vfs_stat st;

    if (collection->number == 0 || collection->number >= dd->next_number ||
        collection->number >= NUMBER_MAX)
        return error_set(err, ERR_INVALID, "collection number %" PRIu64 " was never handed out",
                         collection->number);
    if (by_number(dd, collection->number))
        return error_set(err, ERR_EXISTS, "collection number %" PRIu64 " is listed already",
                         collection->number);
    if (check_collection(dd, collection, err) < 0 ||
        data_directory_collection_path(dd, collection->number, path, err) < 0 ||
        file_stat(dd->vfs, path, &st, err) < 0)
        return -1;
    if (st.kind != VFS_DIRECTORY)
        return error_set(err, ERR_INVALID, "%s is no folder", path);
    /* The entry in collections/ must not be younger than the MANIFEST that names it. */
    if (file_dirsync(dd->vfs, dd->collections_path, err) < 0)
        return -1;
    return change(dd, collection->number, collection, err);
}

int data_directory_update(struct data_directory *dd, const struct data_collection *collection,
                          struct error *err)
{
    if (!by_number(dd, collection->number))
        return error_set(err, ERR_NOT_FOUND, "there is no collection of number %" PRIu64,
                         collection->number);
    if (check_collection(dd, collection, err) < 0)
        return -1;
    return change(dd, collection->number, collection, err);
}

int data_directory_remove(struct data_directory *dd, uint64_t number, struct error *err)
{
    if (!by_number(dd, number))
        return error_set(err, ERR_NOT_FOUND, "there is no collection of number %" PRIu64, number);
    return change(dd, number, NULL, err);
}

int data_directory_rebuild_catalogue(struct data_directory *dd, struct error *err)
{
    catalogue_close(dd->catalogue, 0, NULL);
    dd->catalogue = NULL;
    return open_catalogue(dd, 0, err);
}

int data_directory_catalogue_stats(struct data_directory *dd, struct catalogue_stats *stats,
                                   struct error *err)
{
    if (!dd->catalogue)
        return error_set(err, ERR_NOT_FOUND, "%s: not in use", dd->catalogue_path);
    return catalogue_stats_get(dd->catalogue, stats, err);
}
