// fakegpu is a kubelet's device plugin that advertises pretend devices of one extended resource. It registers whenever a kubelet
// appears: before, after, and again when it was restarted, as a real plugin does.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

type plugin struct {
	api.UnimplementedDevicePluginServer
	devices []*api.Device
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: p.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	answer := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		environment := map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")}
		answer.ContainerResponses = append(answer.ContainerResponses, &api.ContainerAllocateResponse{Envs: environment})
	}
	return answer, nil
}

// register serves on a new socket beside the kubelet's and tells the kubelet of it.
func register(p *plugin, folder, resource string) (*grpc.Server, error) {
	name := "fake-" + strings.NewReplacer("/", "-", ".", "-").Replace(resource) + ".sock"
	os.Remove(filepath.Join(folder, name))
	listener, err := net.Listen("unix", filepath.Join(folder, name))
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	go server.Serve(listener)
	kubelet, err := grpc.NewClient("unix://"+filepath.Join(folder, "kubelet.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		server.Stop()
		return nil, err
	}
	defer kubelet.Close()
	limited, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: name, ResourceName: resource}
	if _, err := api.NewRegistrationClient(kubelet).Register(limited, request); err != nil {
		server.Stop()
		return nil, err
	}
	return server, nil
}

func main() {
	folder := flag.String("dir", "/var/lib/kubelet/device-plugins", "the kubelet's folder of sockets")
	resource := flag.String("resource", "nvidia.com/gpu", "name of the extended resource")
	count := flag.Int("n", 8, "how many devices")
	flag.Parse()
	p := &plugin{}
	kind := strings.ToUpper((*resource)[strings.LastIndex(*resource, "/")+1:])
	for i := range *count {
		p.devices = append(p.devices, &api.Device{ID: fmt.Sprintf("%s-FAKE-%d", kind, i), Health: api.Healthy})
	}
	var known os.FileInfo
	var server *grpc.Server
	for ; ; time.Sleep(200 * time.Millisecond) {
		now, err := os.Stat(filepath.Join(*folder, "kubelet.sock"))
		if err != nil || (known != nil && os.SameFile(known, now) && known.ModTime().Equal(now.ModTime())) {
			continue
		}
		if server != nil {
			server.Stop()
		}
		if server, err = register(p, *folder, *resource); err != nil {
			log.Printf("not registered yet: %v", err)
			continue
		}
		known = now
		log.Printf("registered %d %s", *count, *resource)
	}
}
