// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// Runs a machine and checkpoints it again and again while it runs; prints what each one cost.
//
//     monitor DOMAIN.xml IMAGE [COUNT]
#include <livepoint.hpp>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char **argv)
try {
    if (argc != 3 && argc != 4) {
        std::cerr << "usage: monitor DOMAIN.xml IMAGE [COUNT]\n";
        return 2;
    }
    std::ifstream file(argv[1]);
    if (!file) {
        std::cerr << argv[1] << ": cannot be read\n";
        return 1;
    }
    std::string xml{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    int count = argc == 4 ? std::atoi(argv[3]) : 3;
    livepoint::machine machine(xml);
    machine.start();
    for (int taken = 0; taken < count && !machine.wait(500); taken++) {
        livepoint::job job = machine.checkpoint(argv[2]);
        job.wait();
        lvp_statistics cost = job.statistics();
        std::cout << "checkpoint " << taken + 1 << ": still for " << cost.downtime_us << " us of "
                  << cost.total_us << ", " << cost.image_bytes << " bytes\n";
    }
    livepoint::image image(argv[2]);
    image.verify();
    std::cout << "the last image is whole\n";
    return 0;
} catch (const livepoint::error &error) {
    std::cerr << "monitor: " << error.what() << " (status " << error.status() << ")\n";
    return 1;
}
