/* bench_http: what a search costs over HTTP, on kept-alive connections.
 *
 * usage: bench_http HOST PORT COLLECTION QUERIES.fbin [LIMIT] [CONNECTIONS] [SEARCH_LIST]
 *
 * Every connection is a thread that sends its share of the queries one after the other. Prints the
 * median, mean and 99th percentile of the time from the first byte sent to the last received, and
 * queries a second. Compare with `annd bench --inflight 1` at the same list. Loopback only. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "index/vector_source.h"
#include "storage/base/json_writer.h"

#define ANSWER_MAX (1u << 20)
#define WARM_UP 50u

struct client {
    pthread_t thread;
    struct sockaddr_in address;
    char **requests;
    size_t *request_bytes;
    uint32_t first, step, count;
    double *latency_us; /* count of them, by query */
    const char *problem;
};

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* Reads one answer; NULL, or what went wrong. */
static const char *answer_read(int fd, char *buffer)
{
    size_t held = 0, wanted = 0;
    char *body = NULL;

    while (!body || held < wanted) {
        ssize_t got = recv(fd, buffer + held, ANSWER_MAX - 1 - held, 0);

        if (got <= 0)
            return "the server closed the connection";
        held += (size_t)got;
        buffer[held] = 0;
        if (!body && (body = strstr(buffer, "\r\n\r\n"))) {
            char *length = strcasestr(buffer, "content-length:");

            body += 4;
            if (!length)
                return "the answer has no Content-Length";
            wanted = (size_t)(body - buffer) + strtoul(length + 15, NULL, 10);
            if (wanted >= ANSWER_MAX)
                return "the answer is too long";
        }
    }
    return strstr(body, "\"code\":0") ? NULL : "the server answered with an error";
}

static void *client_run(void *context)
{
    struct client *c = context;
    char *buffer = malloc(ANSWER_MAX);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!buffer || connect(fd, (struct sockaddr *)&c->address, sizeof c->address) < 0) {
        c->problem = "cannot connect";
        goto done;
    }
    for (uint32_t round = 0; round < 2 && !c->problem; round++)
        for (uint32_t i = c->first; i < c->count && !c->problem; i += c->step) {
            if (round == 0 && i / c->step >= WARM_UP)
                break;
            double start = now_us();

            for (size_t sent = 0; sent < c->request_bytes[i];) {
                ssize_t n =
                    send(fd, c->requests[i] + sent, c->request_bytes[i] - sent, MSG_NOSIGNAL);

                if (n <= 0) {
                    c->problem = "sending failed";
                    goto done;
                }
                sent += (size_t)n;
            }
            c->problem = answer_read(fd, buffer);
            c->latency_us[i] = now_us() - start;
        }
done:
    if (c->problem)
        fprintf(stderr, "bench_http: %s: %.300s\n", c->problem, buffer ? buffer : "");
    close(fd);
    free(buffer);
    return NULL;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    struct error err = ERROR_INIT;
    struct vector_source *source;

    if (argc < 5) {
        fprintf(stderr, "usage: bench_http HOST PORT COLLECTION QUERIES [LIMIT] [CONNECTIONS] "
                        "[SEARCH_LIST]\n");
        return 2;
    }
    if (strncmp(argv[1], "127.", 4)) {
        fprintf(stderr, "bench_http: %s is not on this machine; 127.0.0.1 is\n", argv[1]);
        return 2;
    }
    if (vector_source_open(vfs_posix(), argv[4], &source, &err) < 0) {
        fprintf(stderr, "bench_http: %s\n", err.message);
        return 1;
    }
    uint32_t count = (uint32_t)vector_source_rows(source), dim = vector_source_dim(source);
    uint32_t limit = argc > 5 ? (uint32_t)atoi(argv[5]) : 10;
    uint32_t connections = argc > 6 ? (uint32_t)atoi(argv[6]) : 1;
    uint32_t list = argc > 7 ? (uint32_t)atoi(argv[7]) : 100;
    char **requests = calloc(count, sizeof *requests);
    size_t *bytes = calloc(count, sizeof *bytes);
    double *latency = calloc(count, sizeof *latency);
    float *query = malloc(dim * sizeof *query);
    struct client *clients = calloc(connections ? connections : 1, sizeof *clients);

    if (!requests || !bytes || !latency || !query || !clients || !connections)
        return 1;
    for (uint32_t i = 0; i < count; i++) {
        struct json_writer w;
        const char *body;
        size_t body_bytes;

        if (vector_source_read_f32(source, i, 1, query, &err) < 0)
            return 1;
        json_writer_init(&w, 16u << 20);
        json_begin_object(&w);
        json_key(&w, "collectionName");
        json_string(&w, argv[3]);
        json_key(&w, "limit");
        json_uint64(&w, limit);
        json_key(&w, "searchParams");
        json_begin_object(&w);
        json_key(&w, "search_list");
        json_uint64(&w, list);
        json_end_object(&w);
        json_key(&w, "data");
        json_begin_array(&w);
        json_float_array(&w, query, dim);
        json_end_array(&w);
        json_end_object(&w);
        if (json_writer_finish(&w, &body, &body_bytes, &err) < 0)
            return 1;
        int n = asprintf(&requests[i],
                         "POST /v2/vectordb/entities/search HTTP/1.1\r\nHost: %s:%s\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                         argv[1], argv[2], body_bytes, body);

        if (n < 0)
            return 1;
        bytes[i] = (size_t)n;
        json_writer_release(&w);
    }
    double start = now_us();

    for (uint32_t c = 0; c < connections; c++) {
        clients[c] = (struct client){.requests = requests,
                                     .request_bytes = bytes,
                                     .first = c,
                                     .step = connections,
                                     .count = count,
                                     .latency_us = latency};
        clients[c].address.sin_family = AF_INET;
        clients[c].address.sin_port = htons((uint16_t)atoi(argv[2]));
        inet_pton(AF_INET, argv[1], &clients[c].address.sin_addr);
        if (pthread_create(&clients[c].thread, NULL, client_run, &clients[c]))
            return 1;
    }
    bool failed = false;

    for (uint32_t c = 0; c < connections; c++) {
        pthread_join(clients[c].thread, NULL);
        failed |= clients[c].problem != NULL;
    }
    double seconds = (now_us() - start) / 1e6, sum = 0;

    if (failed)
        return 1;
    for (uint32_t i = 0; i < count; i++)
        sum += latency[i];
    qsort(latency, count, sizeof *latency, compare);
    printf("{\"queries\":%u,\"connections\":%u,\"search_list\":%u,\"latency_us_p50\":%.1f,"
           "\"latency_us_mean\":%.1f,\"latency_us_p99\":%.1f,\"qps\":%.1f}\n",
           count, connections, list, latency[count / 2], sum / count,
           latency[(uint64_t)count * 99 / 100], count / seconds);
    return 0;
}
