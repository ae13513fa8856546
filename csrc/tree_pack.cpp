// Token sequences -> their trie in depth-first pre-order, and the tile lists of its attention mask.
//
// Host code behind a plain C ABI, called through ctypes (kernels/tree_attention/native.py). The NumPy forms in tree/packing.py and
// kernels/tree_attention/layout.py are the reference; outputs are identical. A node is an unbranched run of tokens that
// points into the sequence which first needed it, so nothing is copied until the pack is written.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

struct Node {
    const int64_t* tokens;
    int64_t length;
    int64_t depth;         // of the first token
    int32_t parent;
    int32_t slot;          // place among the parent's children
    std::vector<int32_t> children;
    int64_t start = 0;     // first packed token
    int64_t end = 0;       // one past the last packed token of the subtree
};

struct Edge {
    int32_t node;
    int64_t token;
    bool operator==(const Edge& other) const { return node == other.node && token == other.token; }
};

struct EdgeHash {
    size_t operator()(const Edge& edge) const {
        uint64_t x = static_cast<uint64_t>(edge.token) * 0x9E3779B97F4A7C15ull + static_cast<uint32_t>(edge.node);
        x ^= x >> 32;
        return x * 0xD6E8FEB86659FD93ull;
    }
};

struct Pack {
    std::vector<Node> nodes;
    std::unordered_map<Edge, int32_t, EdgeHash> edges;
    std::vector<int32_t> last;      // per sequence: node of its last token
    std::vector<int64_t> offset;    // per sequence: where its token_index begins
    int64_t tokens = 0;
};

// memcmp finds the differing block with vector instructions; the loop then finds the token.
int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t size) {
    constexpr int64_t kBlock = 256;
    int64_t at = 0;
    while (at + kBlock <= size && std::memcmp(a + at, b + at, kBlock * sizeof(int64_t)) == 0) at += kBlock;
    while (at < size && a[at] == b[at]) ++at;
    return at;
}

int32_t add_node(Pack& pack, const int64_t* tokens, int64_t length, int64_t depth, int32_t parent) {
    const auto id = static_cast<int32_t>(pack.nodes.size());
    const auto slot = static_cast<int32_t>(pack.nodes[parent].children.size());
    pack.nodes.push_back({tokens, length, depth, parent, slot, {}});
    pack.nodes[parent].children.push_back(id);
    pack.edges[{parent, tokens[0]}] = id;
    return id;
}

// Cut `node` after `length` tokens. The new node is the head: the tail keeps its id, and so its edges, children and
// the sequences that end in it.
int32_t split_node(Pack& pack, int32_t node, int64_t length) {
    const auto head = static_cast<int32_t>(pack.nodes.size());
    pack.nodes.push_back({});
    Node& tail = pack.nodes[node];
    pack.nodes[head] = {tail.tokens, length, tail.depth, tail.parent, tail.slot, {node}};
    pack.nodes[tail.parent].children[tail.slot] = head;
    pack.edges[{tail.parent, tail.tokens[0]}] = head;
    tail.tokens += length;
    tail.length -= length;
    tail.depth += length;
    tail.parent = head;
    tail.slot = 0;
    pack.edges[{head, tail.tokens[0]}] = node;
    return head;
}

int32_t insert(Pack& pack, const int64_t* tokens, int64_t length) {
    int32_t node = 0;
    for (int64_t at = 0; at < length;) {
        const auto edge = pack.edges.find({node, tokens[at]});
        if (edge == pack.edges.end()) {
            pack.tokens += length - at;
            return add_node(pack, tokens + at, length - at, at, node);
        }
        int32_t child = edge->second;
        const int64_t run = pack.nodes[child].length;
        const int64_t common = common_prefix(pack.nodes[child].tokens, tokens + at, std::min(run, length - at));
        at += common;
        if (common < run && at < length) child = split_node(pack, child, common);
        node = child;
    }
    return node;
}

// Pre-order places: start and end of every node.
void lay_out(Pack& pack) {
    std::vector<std::pair<int32_t, size_t>> stack{{0, 0}};
    int64_t at = 0;
    while (!stack.empty()) {
        auto& [id, next] = stack.back();
        Node& node = pack.nodes[id];
        if (next == 0) {
            node.start = at;
            at += node.length;
        }
        if (next < node.children.size()) {
            const int32_t child = node.children[next++];
            stack.push_back({child, 0});
        } else {
            node.end = at;
            stack.pop_back();
        }
    }
}

template <typename Work>
void in_threads(int threads, int64_t count, Work work) {
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    std::vector<std::thread> others;
    int started = 1;
    for (; started < threads; ++started) {
        try {
            others.emplace_back(work, count * started / threads, count * (started + 1) / threads);
        } catch (...) {  // no thread to be had: the rest is done here
            break;
        }
    }
    work(0, count / threads);
    if (started < threads) work(count * started / threads, count);
    for (auto& other : others) other.join();
}

void write_nodes(const Pack& pack, int64_t first, int64_t last, int64_t* ids, int64_t* position, int32_t* subtree_end) {
    for (int64_t n = first; n < last; ++n) {
        const Node& node = pack.nodes[n];
        if (node.length) std::memcpy(ids + node.start, node.tokens, node.length * sizeof(int64_t));
        for (int64_t i = 0; i < node.length; ++i) position[node.start + i] = node.depth + i;
        std::fill_n(subtree_end + node.start, node.length, static_cast<int32_t>(node.end));
    }
}

void write_index(const Pack& pack, int64_t first, int64_t last, int64_t* index) {
    for (int64_t s = first; s < last; ++s) {
        const int64_t length = pack.offset[s + 1] - pack.offset[s];
        int64_t* out = index + pack.offset[s];
        for (int32_t n = pack.last[s]; n > 0; n = pack.nodes[n].parent) {
            const Node& node = pack.nodes[n];
            const int64_t stop = std::min(length, node.depth + node.length);
            for (int64_t i = node.depth; i < stop; ++i) out[i] = node.start + i - node.depth;
        }
    }
}

struct TileBounds {
    std::vector<int32_t> end_min, end_max, depth_min, depth_max;
    TileBounds(const int32_t* end, const int32_t* depth, int64_t size, int64_t block) {
        for (int64_t first = 0; first < size; first += block) {
            const int64_t last = std::min(first + block, size);
            const auto [e0, e1] = std::minmax_element(end + first, end + last);
            const auto [d0, d1] = std::minmax_element(depth + first, depth + last);
            end_min.push_back(*e0);
            end_max.push_back(*e1);
            depth_min.push_back(*d0);
            depth_max.push_back(*d1);
        }
    }
};

}  // namespace

extern "C" {

// Build the trie of `count` sequences. Null if memory ran out. The sequences must outlive the pack.
void* tree_pack_build(const int64_t* const* sequences, const int64_t* lengths, int64_t count, int64_t* num_tokens) {
    try {
        auto pack = std::make_unique<Pack>();
        pack->nodes.push_back({nullptr, 0, 0, 0, 0, {}});
        pack->nodes.reserve(2 * count + 1);
        pack->edges.reserve(2 * count + 1);
        pack->offset.push_back(0);
        for (int64_t s = 0; s < count; ++s) {
            pack->last.push_back(insert(*pack, sequences[s], lengths[s]));
            pack->offset.push_back(pack->offset.back() + lengths[s]);
        }
        lay_out(*pack);
        *num_tokens = pack->tokens;
        return pack.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// Write input_ids, position and subtree_end [num_tokens], and the token indices of all sequences, one after the other.
void tree_pack_write(const void* handle, int threads, int64_t* ids, int64_t* position, int32_t* subtree_end,
                     int64_t* index) {
    const Pack& pack = *static_cast<const Pack*>(handle);
    in_threads(threads, static_cast<int64_t>(pack.nodes.size()), [&](int64_t first, int64_t last) {
        write_nodes(pack, first, last, ids, position, subtree_end);
    });
    in_threads(threads, static_cast<int64_t>(pack.last.size()),
               [&](int64_t first, int64_t last) { write_index(pack, first, last, index); });
}

void tree_pack_free(void* handle) { delete static_cast<Pack*>(handle); }

// Tile lists (kernels/tree_attention/layout.py, tile_list). With cols null: ptr [tiles + 1] and split [tiles]; returns the
// entries that cols needs. With cols: writes them. `window` 0: none. Returns -1 if memory ran out.
int64_t tree_tile_list(const int32_t* end, const int32_t* depth, int64_t size, int64_t block_m, int64_t block_n,
                       int64_t window, int threads, int32_t* ptr, int32_t* split, int32_t* cols) {
    try {
        const TileBounds n(end, depth, size, block_n), m(end, depth, size, block_m);
        const auto tiles = static_cast<int64_t>(m.end_min.size());
        auto visit = [&](int64_t i, int32_t* out_full, int32_t* out_part, int64_t& full, int64_t& part) {
            const int64_t first = i * block_m, last = std::min((i + 1) * block_m, size) - 1;
            full = part = 0;
            for (int64_t j = 0; j * block_n <= last; ++j) {
                if (n.end_max[j] <= first) continue;
                if (window && m.depth_min[i] - n.depth_max[j] >= window) continue;
                const bool whole = (j + 1) * block_n - 1 <= first && n.end_min[j] > last &&
                                   (!window || m.depth_max[i] - n.depth_min[j] < window);
                int32_t*& out = whole ? out_full : out_part;
                if (out) *out++ = static_cast<int32_t>(j);
                ++(whole ? full : part);
            }
        };
        in_threads(threads, tiles, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) {
                int64_t full, part;
                if (cols) {
                    visit(i, cols + ptr[i], cols + split[i], full, part);
                } else {
                    visit(i, nullptr, nullptr, full, part);
                    split[i] = static_cast<int32_t>(full);
                    ptr[i + 1] = static_cast<int32_t>(full + part);
                }
            }
        });
        if (!cols) {
            ptr[0] = 0;
            for (int64_t i = 0; i < tiles; ++i) {
                split[i] += ptr[i];
                ptr[i + 1] += ptr[i];
            }
        }
        return ptr[tiles];
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // extern "C"
