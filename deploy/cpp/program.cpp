#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>

#include "fault.h"
#include "letterbox.h"
#include "picture.h"

namespace dcn {
namespace {

namespace fs = std::filesystem;

// The colours of utils/plots.py; class c has colour c mod 20.
constexpr Colour kPalette[] = {
    {0xFF, 0x38, 0x38}, {0xFF, 0x9D, 0x97}, {0xFF, 0x70, 0x1F}, {0xFF, 0xB2, 0x1D}, {0xCF, 0xD2, 0x31},
    {0x48, 0xF9, 0x0A}, {0x92, 0xCC, 0x17}, {0x3D, 0xDB, 0x86}, {0x1A, 0x93, 0x34}, {0x00, 0xD4, 0xBB},
    {0x2C, 0x99, 0xA8}, {0x00, 0xC2, 0xFF}, {0x34, 0x45, 0x93}, {0x64, 0x73, 0xFF}, {0x00, 0x18, 0xEC},
    {0x84, 0x38, 0xFF}, {0x52, 0x00, 0x85}, {0xCB, 0x38, 0xFF}, {0xFF, 0x95, 0xC8}, {0xFF, 0x37, 0xC7},
};

// A picture on its way through the model.
struct Frame {
    std::string path;
    Picture picture;
    Letterbox box;
};

std::string general(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

std::vector<std::string> pictures_in(const std::string& source) {
    std::error_code error;
    if (fs::is_regular_file(source, error)) return {source};
    if (!fs::is_directory(source, error)) throw Fault(source + ": no such folder or picture");
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(source, error))
        if (entry.is_regular_file(error) && is_picture(entry.path().string())) found.push_back(entry.path().string());
    if (error) throw Fault(source + ": cannot be read (" + error.message() + ")");
    if (found.empty()) throw Fault(source + ": holds no pictures");
    std::sort(found.begin(), found.end());
    return found;
}

// project/name, or name2, name3, ... where it exists.
fs::path new_folder(const Options& options) {
    std::error_code error;
    fs::create_directories(options.project, error);
    for (int number = 1; !error; ++number) {
        const fs::path folder = fs::path(options.project) / (options.name + (number == 1 ? "" : std::to_string(number)));
        if (fs::create_directories(folder, error) || (options.exist_ok && !error)) return folder;
    }
    throw Fault(options.project + "/" + options.name + ": cannot make this folder (" + error.message() + "); use --project");
}

// Writes the results of pictures; those of the same stem get -2, -3, ...
class Results {
  public:
    Results(const Options& options, const Metadata& meta) : options_(options), meta_(meta) {
        if (!options.save_pictures && !options.save_text) return;
        folder_ = new_folder(options);
        if (options.save_text) fs::create_directories(folder_ / "labels");
    }

    void write(Frame& frame, const std::vector<Detection>& found) {
        const std::string stem = free_stem(fs::path(frame.path).stem().string());
        if (options_.save_text) write_labels(folder_ / "labels" / (stem + ".txt"), frame.picture, found);
        if (!options_.save_pictures) return;
        mark(frame.picture, found);
        write_picture((folder_ / (stem + suffix_for(frame.path))).string(), frame.picture);
    }

    const fs::path& folder() const { return folder_; }

  private:
    std::string free_stem(const std::string& stem) {
        std::string name = stem;
        for (int number = 2; !taken_.insert(name).second; ++number) name = stem + "-" + std::to_string(number);
        return name;
    }

    // The least confident first, as detect.py.
    void write_labels(const fs::path& path, const Picture& picture, const std::vector<Detection>& found) const {
        if (found.empty()) {
            std::error_code error;
            fs::remove(path, error);
            return;
        }
        std::ofstream file(path);
        const double width = picture.width, height = picture.height;
        for (auto each = found.rbegin(); each != found.rend(); ++each) {
            const double x1 = each->x1, y1 = each->y1, x2 = each->x2, y2 = each->y2;
            file << each->cls << ' ' << general((x1 + x2) / 2 / width) << ' ' << general((y1 + y2) / 2 / height) << ' '
                 << general((x2 - x1) / width) << ' ' << general((y2 - y1) / height);
            if (options_.save_confidence) file << ' ' << general(each->score);
            file << '\n';
        }
        if (!file.flush()) throw Fault(path.string() + ": cannot be written");
    }

    void mark(Picture& picture, const std::vector<Detection>& found) const {
        std::vector<Mark> marks;
        for (auto each = found.rbegin(); each != found.rend(); ++each) {
            std::string text = options_.draw_labels ? meta_.names[each->cls] : "";
            char share[16];
            std::snprintf(share, sizeof share, " %.2f", each->score);
            if (options_.draw_labels && options_.draw_confidence) text += share;
            const auto whole = [](float value) { return static_cast<int>(value); };
            marks.push_back({whole(each->x1), whole(each->y1), whole(each->x2), whole(each->y2),
                             kPalette[each->cls % std::size(kPalette)], text});
        }
        const int suits = static_cast<int>(std::nearbyint((picture.height + picture.width) / 600.0));
        draw(picture, marks, options_.line_width ? options_.line_width : std::max(1, suits));
    }

    const Options& options_;
    const Metadata& meta_;
    fs::path folder_;
    std::set<std::string> taken_;
};

// `2 RBCs, 1 WBC`, in the order of the class numbers.
std::string counts(const std::vector<Detection>& found, const Metadata& meta) {
    std::map<int, int> numbers;
    for (const Detection& each : found) ++numbers[each.cls];
    std::string text;
    for (const auto& [cls, number] : numbers)
        text += (text.empty() ? "" : ", ") + std::to_string(number) + " " + meta.names[cls] + (number > 1 ? "s" : "");
    return text.empty() ? "(no detections)" : text;
}

class Detector {
  public:
    Detector(const Options& options, Model& model)
        : options_(options), model_(model), meta_(model.metadata()), results_(options, meta_) {}

    int run(const std::vector<std::string>& paths) {
        std::size_t read = 0;
        for (const std::string& path : paths) {
            Frame frame;
            try {
                frame.picture = read_picture(path);
            } catch (const Fault& fault) {
                std::fprintf(stderr, "warning: %s\n", fault.what());
                continue;
            }
            ++read;
            frame.path = path;
            frame.box = frame_for(frame.picture);
            if (!waiting_.empty() && frame_of(frame.box) != frame_of(waiting_[0].box)) flush();
            waiting_.push_back(std::move(frame));
            if (waiting_.size() >= static_cast<std::size_t>(std::min(options_.batch, model_.most()))) flush();
        }
        flush();
        if (read) std::printf("%.1f ms an image in the model, %zu images\n", milliseconds_ / static_cast<double>(read), read);
        if (!results_.folder().empty()) std::printf("Results saved to %s\n", results_.folder().string().c_str());
        return read == paths.size() ? 0 : 1;
    }

  private:
    // A file of one size sees squares (or what it was made for), another the smallest rectangle, as in Python.
    Letterbox frame_for(const Picture& picture) const {
        const auto up = [&](int side) { return (side + meta_.stride - 1) / meta_.stride * meta_.stride; };
        if (!meta_.dynamic) return fit(picture.height, picture.width, meta_.height, meta_.width, false, meta_.stride);
        return fit(picture.height, picture.width, up(options_.frame_height), up(options_.frame_width), true, meta_.stride);
    }

    // The pictures that wait, all of one frame, through the model.
    void flush() {
        if (waiting_.empty()) return;
        const auto [height, width] = frame_of(waiting_[0].box);
        const std::size_t size = 3 * static_cast<std::size_t>(height) * width;
        const int count = static_cast<int>(waiting_.size()), classes = static_cast<int>(meta_.names.size());
        std::vector<float> images(size * waiting_.size());
        for (int i = 0; i < count; ++i) letterbox(waiting_[i].picture, waiting_[i].box, images.data() + size * i);
        const auto start = std::chrono::steady_clock::now();
        const std::vector<float> predictions = model_.run(images, count, height, width);
        const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
        milliseconds_ += passed.count();
        const std::int64_t rows = rows_of(predictions.size(), count, classes, options_.model);
        for (int i = 0; i < count; ++i) {
            const float* own = predictions.data() + static_cast<std::size_t>(i) * rows * (5 + classes);
            std::vector<Detection> found = detections(own, rows, classes, options_.limits);
            to_original(found, waiting_[i].box);
            std::printf("%s: %dx%d %s\n", waiting_[i].path.c_str(), height, width, counts(found, meta_).c_str());
            results_.write(waiting_[i], found);
        }
        waiting_.clear();
    }

    const Options& options_;
    Model& model_;
    const Metadata& meta_;
    Results results_;
    std::vector<Frame> waiting_;
    double milliseconds_ = 0;
};

}  // namespace

std::int64_t rows_of(std::size_t values, int count, int classes, const std::string& source) {
    const std::size_t row = static_cast<std::size_t>(count) * (5 + static_cast<std::size_t>(classes));
    if (values == 0 || values % row)
        throw Fault(source + ": gives " + std::to_string(values) + " values, which is no number of predictions of " +
                    std::to_string(classes) + " classes; export it again");
    return static_cast<std::int64_t>(values / row);
}

int run_program(int count, char** words, const std::string& program, const std::string& model, const Opener& open) {
    try {
        const Options options = parse_options(count, words);
        if (options.help) {
            std::fputs(usage(program, model).c_str(), stdout);
            return 0;
        }
        if (!fs::is_regular_file(options.model)) throw Fault(options.model + ": no such file");
        const std::vector<std::string> paths = pictures_in(options.source);
        const std::unique_ptr<Model> opened = open(options);
        const int classes = static_cast<int>(opened->metadata().names.size());
        for (int wanted : options.limits.classes)
            if (wanted >= classes)
                throw Fault("--classes " + std::to_string(wanted) + ": this model has classes 0 to " +
                            std::to_string(classes - 1));
        return Detector(options, *opened).run(paths);
    } catch (const Fault& fault) {
        std::fflush(stdout);
        std::fprintf(stderr, "error: %s\n", fault.what());
    } catch (const std::exception& error) {
        std::fflush(stdout);
        const std::string text = error.what();
        std::fprintf(stderr, "error: %s\n", text.substr(0, text.find('\n')).c_str());
    }
    return 2;
}

}  // namespace dcn
